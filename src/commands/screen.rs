//! Where a command's words go: plain lines, or on a terminal also a picture at the bottom that is drawn over in place.
//! Knows nothing of runs. Called by `demo` and `follow`.

use std::io::{self, IsTerminal, Stdout, Write};

/// Colours, on a terminal whose user did not say NO_COLOR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Paint {
    Bold,
    Dim,
    Green,
    Yellow,
    Red,
    Cyan,
}

pub(super) struct Screen {
    out: Stdout,
    /// Is there a picture to draw over, or only lines?
    pub(super) live: bool,
    colours: bool,
    /// Lines of the picture as it stands.
    drawn: usize,
    /// What it was made of.
    last: Vec<String>,
}

impl Screen {
    pub(super) fn new() -> Self {
        let out = io::stdout();
        let set =
            |variable: &str| std::env::var_os(variable).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let live = out.is_terminal() && !dumb;
        Self {
            out,
            live,
            colours: live && !set("NO_COLOR"),
            drawn: 0,
            last: Vec::new(),
        }
    }

    /// Lines only, whatever the tests run in.
    #[cfg(test)]
    pub(super) fn plain() -> Self {
        Self {
            out: io::stdout(),
            live: false,
            colours: false,
            drawn: 0,
            last: Vec::new(),
        }
    }

    pub(super) fn paint(&self, paint: Paint, text: &str) -> String {
        if !self.colours {
            return text.to_owned();
        }
        let code = match paint {
            Paint::Bold => 1,
            Paint::Dim => 2,
            Paint::Green => 32,
            Paint::Yellow => 33,
            Paint::Red => 31,
            Paint::Cyan => 36,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// For good, above any picture.
    pub(super) fn line(&mut self, text: &str) -> io::Result<()> {
        debug_assert_eq!(self.drawn, 0, "lines and a picture at once");
        let mut out = self.out.lock();
        writeln!(out, "{text}")?;
        out.flush()
    }

    /// A heading and what belongs to it.
    #[cfg(feature = "demo")]
    pub(super) fn section(&mut self, title: &str, lines: &[String]) -> io::Result<()> {
        let title = self.paint(Paint::Bold, title);
        self.line("")?;
        self.line(&title)?;
        lines
            .iter()
            .try_for_each(|line| self.line(&format!("  {line}")))
    }

    /// The picture, in place of the last. Cut to what the terminal holds, or the next would land in the wrong place.
    pub(super) fn draw(&mut self, picture: &[String]) -> io::Result<()> {
        if self.drawn > 0 && self.last == picture {
            return Ok(());
        }
        self.last = picture.to_vec();
        let mut text = String::new();
        if self.drawn > 0 {
            text.push_str(&format!("\x1b[{}A", self.drawn));
        }
        let (columns, rows) = size(&self.out);
        let shown = picture.len().min(rows - 1);
        for line in &picture[..shown] {
            text.push_str("\r\x1b[2K");
            text.push_str(&cut(line, columns));
            text.push('\n');
        }
        // What the last one had more.
        text.push_str("\x1b[0J");
        self.drawn = shown;
        let mut out = self.out.lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// The picture stays as it is.
    pub(super) fn settle(&mut self) {
        self.drawn = 0;
    }
}

/// Columns and rows; a window that does not say is taken for a usual one.
fn size(out: &Stdout) -> (usize, usize) {
    match rustix::termios::tcgetwinsize(out) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 1 => {
            (usize::from(size.ws_col), usize::from(size.ws_row))
        }
        Ok(_) | Err(_) => (80, 24),
    }
}

/// The first `columns` characters, colours not counted and ended.
fn cut(line: &str, columns: usize) -> String {
    let (mut text, mut seen, mut colour) = (String::new(), 0, false);
    for letter in line.chars() {
        if colour {
            colour = letter != 'm';
        } else if letter == '\x1b' {
            colour = true;
        } else if seen == columns {
            return text + "\x1b[0m";
        } else {
            seen += 1;
        }
        text.push(letter);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_cut_by_what_is_seen_of_it() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("├─ ✔ ab", 5), "├─ ✔ \x1b[0m");
        let painted = "\x1b[32m✔\x1b[0m done";
        assert_eq!(cut(painted, 6), painted);
        assert_eq!(cut(painted, 2), "\x1b[32m✔\x1b[0m \x1b[0m");
    }
}
