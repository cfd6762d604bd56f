//! `flowgate check-config FILE`: what `serve` would say of this file, here and now (the environment counts too), every
//! problem at once. Starts nothing, dials nobody. Called by `main`.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use crate::config::{self, Flags};

/// 0 and "ok", or 1 and the problems on standard error.
pub fn run(path: &Path) -> ExitCode {
    match report(
        path,
        config::environment(),
        &mut io::stdout().lock(),
        &mut io::stderr().lock(),
    ) {
        Ok(Verdict::Good) => ExitCode::SUCCESS,
        // Nobody there to read the verdict: then it must not look like a good one.
        Ok(Verdict::Bad) | Err(_) => ExitCode::FAILURE,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    Bad,
}

fn report(
    path: &Path,
    env: impl Iterator<Item = (String, String)>,
    out: &mut impl Write,
    err: &mut impl Write,
) -> io::Result<Verdict> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            writeln!(err, "{}: {error}", path.display())?;
            return Ok(Verdict::Bad);
        }
    };
    match config::from_sources(Some((path, &text)), env, Flags::default()) {
        Ok(_config) => {
            writeln!(out, "ok")?;
            Ok(Verdict::Good)
        }
        Err(problems) => {
            writeln!(err, "{problems}")?;
            Ok(Verdict::Bad)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, env: &[(&str, &str)]) -> (Verdict, String, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flowgate.toml");
        fs::write(&path, text).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let verdict = report(&path, env, &mut out, &mut err).unwrap();
        let text = |bytes| {
            String::from_utf8(bytes)
                .unwrap()
                .replace(&path.display().to_string(), "FILE")
        };
        (verdict, text(out), text(err))
    }

    #[test]
    fn a_good_file_is_ok() {
        let good = (Verdict::Good, "ok\n".to_owned(), String::new());
        assert_eq!(check("[primary]\nurl = \"postgres://db\"\n", &[]), good);
        assert_eq!(
            check("", &[("FLOWGATE_PRIMARY__URL", "postgres://db")]),
            good
        );
    }

    #[test]
    fn every_problem_of_a_bad_file_is_printed() {
        let (verdict, out, err) = check(
            "[pool]\nsize = 0\nsise = 1\n",
            &[("FLOWGATE_AUTH__METHOD", "md5")],
        );
        assert_eq!((verdict, out.as_str()), (Verdict::Bad, ""));
        assert_eq!(
            err,
            "4 problems in the configuration:\n  \
             pool.sise: unknown key; did you mean `pool.size`? (FILE:3)\n  \
             primary.url: is missing; write postgres://user:password@host:port/database\n  \
             auth.method: must be one of \"scram\", \"trust\", not \"md5\" (FLOWGATE_AUTH__METHOD)\n  \
             pool.size: must be at least 1, not 0 (FILE:2)\n"
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let verdict = report(
            Path::new("/nowhere/f.toml"),
            std::iter::empty(),
            &mut out,
            &mut err,
        )
        .unwrap();
        let err = String::from_utf8(err).unwrap();
        assert_eq!(
            (verdict, err.starts_with("/nowhere/f.toml: No such file")),
            (Verdict::Bad, true),
            "{err}"
        );
    }
}
