//! The messages we look into or write ourselves: prefixes of Parse, Bind, Describe, Close, Execute; our own answers.
//! Bodies come as isolated slices and are read with checks only: `None` is a malformed message, never a panic.
//! (protocol-message-formats.html)

/// The transaction status byte of ReadyForQuery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TxStatus {
    Idle,
    InTransaction,
    Failed,
}

impl TxStatus {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            b'I' => Some(Self::Idle),
            b'T' => Some(Self::InTransaction),
            b'E' => Some(Self::Failed),
            _ => None,
        }
    }

    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Idle => b'I',
            Self::InTransaction => b'T',
            Self::Failed => b'E',
        }
    }
}

/// Parse: the statement's name, its text, and the rest (parameter types).
pub(crate) struct Parse<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) text: &'a [u8],
    /// Count and OIDs of the parameter types, as sent.
    pub(crate) types: &'a [u8],
}

impl<'a> Parse<'a> {
    pub(crate) fn read(body: &'a [u8]) -> Option<Self> {
        let (name, rest) = cstr(body)?;
        let (text, types) = cstr(rest)?;
        Some(Self { name, text, types })
    }
}

/// Bind: the portal and the statement; the parameters stay as they are.
pub(crate) struct Bind<'a> {
    pub(crate) portal: &'a [u8],
    pub(crate) statement: &'a [u8],
    /// Formats, parameters, result formats, as sent.
    pub(crate) rest: &'a [u8],
}

impl<'a> Bind<'a> {
    pub(crate) fn read(body: &'a [u8]) -> Option<Self> {
        let (portal, rest) = cstr(body)?;
        let (statement, rest) = cstr(rest)?;
        Some(Self {
            portal,
            statement,
            rest,
        })
    }

    /// The text of parameter `number` (from 1), if it was sent in text format and is not null.
    pub(crate) fn text_parameter(&self, number: u16) -> Option<&'a [u8]> {
        self.parameter(number)
            .filter(|(binary, _)| !binary)
            .map(|(_, value)| value)
    }

    /// The bytes of parameter `number`, in whichever format they came: of a text they are the same in both.
    pub(crate) fn any_parameter(&self, number: u16) -> Option<&'a [u8]> {
        self.parameter(number).map(|(_, value)| value)
    }

    /// The value of a uuid parameter sent in binary format.
    pub(crate) fn uuid_parameter(&self, number: u16) -> Option<uuid::Uuid> {
        let (binary, value) = self.parameter(number)?;
        if binary {
            uuid::Uuid::from_slice(value).ok()
        } else {
            None
        }
    }

    /// The value of an integer parameter, in either format.
    pub(crate) fn integer_parameter(&self, number: u16) -> Option<i64> {
        let (binary, value) = self.parameter(number)?;
        if !binary {
            return std::str::from_utf8(value).ok()?.trim().parse().ok();
        }
        match *value {
            [a, b] => Some(i16::from_be_bytes([a, b]).into()),
            [a, b, c, d] => Some(i32::from_be_bytes([a, b, c, d]).into()),
            [a, b, c, d, e, f, g, h] => Some(i64::from_be_bytes([a, b, c, d, e, f, g, h])),
            _ => None,
        }
    }

    /// Its formats, parameters and result formats, with another value for a parameter that is a small integer, in the format
    /// it came in.
    pub(crate) fn with_integer(&self, number: u16, value: u8) -> Option<Vec<u8>> {
        let (binary, old) = self.parameter(number)?;
        let mut new = value.to_string().into_bytes();
        if binary {
            new = vec![0; old.len()];
            *new.last_mut()? = value;
        }
        let (formats, rest) = take_u16(self.rest)?;
        let mut left = take_u16(rest.get(usize::from(formats) * 2..)?)?.1;
        for _ in 1..number {
            let (length, after) = left.split_first_chunk::<4>()?;
            // Null has no bytes.
            let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
            left = after.get(length..)?;
        }
        let before = self.rest.get(..self.rest.len() - left.len())?;
        let after = left.get(4 + old.len()..)?;
        let length = u32::try_from(new.len()).ok()?.to_be_bytes();
        Some([before, &length, &new, after].concat())
    }

    /// How many parameters are sent.
    pub(crate) fn parameter_count(&self) -> Option<u16> {
        let (formats, rest) = take_u16(self.rest)?;
        let rest = rest.get(usize::from(formats) * 2..)?;
        Some(take_u16(rest)?.0)
    }

    /// The formats wanted for results: none (all text), one for all, or one each. Of a Bind without parameters.
    pub(crate) fn result_formats(&self) -> Option<Vec<u16>> {
        let (formats, rest) = take_u16(self.rest)?;
        let (parameters, rest) = take_u16(rest.get(usize::from(formats) * 2..)?)?;
        if parameters > 0 {
            return None;
        }
        let (count, mut rest) = take_u16(rest)?;
        let mut wanted = Vec::with_capacity(usize::from(count).min(rest.len() / 2));
        for _ in 0..count {
            let (format, after) = take_u16(rest)?;
            wanted.push(format);
            rest = after;
        }
        rest.is_empty().then_some(wanted)
    }

    /// Whether parameter `number` is binary, and its bytes.
    fn parameter(&self, number: u16) -> Option<(bool, &'a [u8])> {
        let index = usize::from(number.checked_sub(1)?);
        let (formats_count, mut rest) = take_u16(self.rest)?;
        let formats = rest.get(..usize::from(formats_count) * 2)?;
        rest = rest.get(formats.len()..)?;
        let format_at = if formats_count == 1 { 0 } else { index * 2 };
        let binary = formats
            .get(format_at..format_at + 2)
            .is_some_and(|format| format != [0, 0]);
        let (count, mut rest) = take_u16(rest)?;
        if index >= usize::from(count) {
            return None;
        }
        for at in 0..=index {
            let (length, after) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(i32::from_be_bytes(*length)).ok();
            let value = length.map_or(Some(&[][..]), |length| after.get(..length))?;
            if at == index {
                return length.map(|_| (binary, value));
            }
            rest = after.get(value.len()..)?;
        }
        None
    }
}

/// Describe or Close: `S` a statement, `P` a portal.
pub(crate) struct Target<'a> {
    pub(crate) kind: u8,
    pub(crate) name: &'a [u8],
}

impl<'a> Target<'a> {
    pub(crate) fn read(body: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = body.split_first()?;
        let (name, rest) = cstr(rest)?;
        rest.is_empty().then_some(Self { kind, name })
    }
}

/// The text of a Query.
pub(crate) fn query_text(body: &[u8]) -> Option<&[u8]> {
    let (text, rest) = cstr(body)?;
    rest.is_empty().then_some(text)
}

/// The name and value of a ParameterStatus.
pub(crate) fn parameter_status(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, rest) = cstr(body)?;
    let (value, _) = cstr(rest)?;
    Some((name, value))
}

/// The first column of a DataRow, as text; `None` when null or absent.
pub(crate) fn first_column(body: &[u8]) -> Option<&[u8]> {
    let (count, rest) = take_u16(body)?;
    let (length, value) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(i32::from_be_bytes(*length)).ok()?;
    if count == 0 {
        None
    } else {
        value.get(..length)
    }
}

fn cstr(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr::memchr(0, bytes)?;
    Some((bytes.get(..end)?, bytes.get(end + 1..)?))
}

fn take_u16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<2>()?;
    Some((u16::from_be_bytes(*number), rest))
}

/// Appends a frame whose body `fill` writes.
pub(crate) fn put_frame(out: &mut Vec<u8>, tag: u8, fill: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let length = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    if let Some(slot) = out.get_mut(at..at + 4) {
        slot.copy_from_slice(&length.to_be_bytes());
    }
}

/// Appends `text` and its terminator; a zero byte inside would end it early, so it is cut there.
pub(crate) fn put_cstr(out: &mut Vec<u8>, text: &[u8]) {
    out.extend(text.iter().copied().take_while(|&byte| byte != 0));
    out.push(0);
}

pub(crate) fn put_query(out: &mut Vec<u8>, text: &str) {
    put_frame(out, b'Q', |out| put_cstr(out, text.as_bytes()));
}

/// Appends a Parse; `types` is its tail as a client sent it (count and OIDs).
pub(crate) fn put_parse(out: &mut Vec<u8>, name: &[u8], text: &[u8], types: &[u8]) {
    put_frame(out, b'P', |out| {
        put_cstr(out, name);
        put_cstr(out, text);
        out.extend_from_slice(types);
    });
}

/// Appends a Describe (`D`) or Close (`C`) of a statement.
pub(crate) fn put_statement_target(out: &mut Vec<u8>, tag: u8, name: &[u8]) {
    put_frame(out, tag, |out| {
        out.push(b'S');
        put_cstr(out, name);
    });
}

pub(crate) fn put_empty(out: &mut Vec<u8>, tag: u8) {
    put_frame(out, tag, |_| ());
}

pub(crate) fn put_ready(out: &mut Vec<u8>, status: TxStatus) {
    put_frame(out, b'Z', |out| out.push(status.byte()));
}

pub(crate) fn put_command_complete(out: &mut Vec<u8>, tag: &str) {
    put_frame(out, b'C', |out| put_cstr(out, tag.as_bytes()));
}

pub(crate) fn put_parameter_status(out: &mut Vec<u8>, name: &str, value: &str) {
    put_frame(out, b'S', |out| {
        put_cstr(out, name.as_bytes());
        put_cstr(out, value.as_bytes());
    });
}

pub(crate) fn put_backend_key(out: &mut Vec<u8>, pid: u32, secret: &[u8]) {
    put_frame(out, b'K', |out| {
        out.extend_from_slice(&pid.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

/// Appends an Authentication message: `code` 0 is Ok, 10 SASL, 11 SASLContinue, 12 SASLFinal.
pub(crate) fn put_authentication(out: &mut Vec<u8>, code: u32, rest: &[u8]) {
    put_frame(out, b'R', |out| {
        out.extend_from_slice(&code.to_be_bytes());
        out.extend_from_slice(rest);
    });
}

/// Appends NegotiateProtocolVersion: the newest minor we speak and the options we do not know.
pub(crate) fn put_negotiate(out: &mut Vec<u8>, minor: u16, unknown: &[&str]) {
    put_frame(out, b'v', |out| {
        out.extend_from_slice(&(0x0003_0000 | u32::from(minor)).to_be_bytes());
        out.extend_from_slice(
            &u32::try_from(unknown.len())
                .unwrap_or(u32::MAX)
                .to_be_bytes(),
        );
        for name in unknown {
            put_cstr(out, name.as_bytes());
        }
    });
}

/// A column of a RowDescription of ours.
pub(crate) struct Described<'a> {
    pub(crate) name: &'a str,
    /// The type's OID and size (-1: varying).
    pub(crate) oid: u32,
    pub(crate) size: i16,
    /// 0 text, 1 binary.
    pub(crate) format: u16,
}

/// Appends a RowDescription.
pub(crate) fn put_columns<'a>(
    out: &mut Vec<u8>,
    columns: impl ExactSizeIterator<Item = Described<'a>>,
) {
    put_frame(out, b'T', |out| {
        let count = u16::try_from(columns.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        for column in columns {
            put_cstr(out, column.name.as_bytes());
            out.extend_from_slice(&[0; 6]); // no table, no column number
            out.extend_from_slice(&column.oid.to_be_bytes());
            out.extend_from_slice(&column.size.to_be_bytes());
            out.extend_from_slice(&(-1i32).to_be_bytes());
            out.extend_from_slice(&column.format.to_be_bytes());
        }
    });
}

/// Appends a DataRow; each value as its column's format has it, `None` is null.
pub(crate) fn put_row(out: &mut Vec<u8>, values: impl ExactSizeIterator<Item = Option<Vec<u8>>>) {
    put_frame(out, b'D', |out| {
        let count = u16::try_from(values.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        for value in values {
            match value {
                Some(bytes) => {
                    let length = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
                    out.extend_from_slice(&length.to_be_bytes());
                    out.extend_from_slice(&bytes);
                }
                None => out.extend_from_slice(&(-1i32).to_be_bytes()),
            }
        }
    });
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;

    fn bind(formats: &[u16], values: &[Option<&[u8]>]) -> Vec<u8> {
        let mut body = b"portal\0statement\0".to_vec();
        body.extend_from_slice(&u16::try_from(formats.len()).unwrap().to_be_bytes());
        formats
            .iter()
            .for_each(|format| body.extend_from_slice(&format.to_be_bytes()));
        body.extend_from_slice(&u16::try_from(values.len()).unwrap().to_be_bytes());
        for value in values {
            let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap());
            body.extend_from_slice(&length.to_be_bytes());
            body.extend_from_slice(value.unwrap_or_default());
        }
        body.extend_from_slice(&[0, 0]);
        body
    }

    #[test]
    fn a_text_parameter_is_found_by_number() {
        let body = bind(&[], &[Some(b"one"), None, Some(b"three")]);
        let read = Bind::read(&body).unwrap();
        assert_eq!(
            (read.portal, read.statement),
            (&b"portal"[..], &b"statement"[..])
        );
        assert_eq!(read.text_parameter(1), Some(&b"one"[..]));
        assert_eq!(read.text_parameter(2), None);
        assert_eq!(read.text_parameter(3), Some(&b"three"[..]));
        assert_eq!(read.text_parameter(4), None);
        assert_eq!(read.text_parameter(0), None);
        let binary = bind(&[1], &[Some(b"\0\x01")]);
        assert_eq!(Bind::read(&binary).unwrap().text_parameter(1), None);
        let mixed = bind(&[1, 0], &[Some(b"\0\x01"), Some(b"two")]);
        assert_eq!(
            Bind::read(&mixed).unwrap().text_parameter(2),
            Some(&b"two"[..])
        );
    }

    #[test]
    fn lying_lengths_inside_a_bind_are_not_believed() {
        let mut body = bind(&[], &[Some(b"one")]);
        let length_at = body.len() - 2 - 3 - 4;
        body[length_at..length_at + 4].copy_from_slice(&i32::MAX.to_be_bytes());
        assert_eq!(Bind::read(&body).unwrap().text_parameter(1), None);
        for cut in 0..body.len() {
            if let Some(read) = Bind::read(&body[..cut]) {
                assert_eq!(read.text_parameter(1), None);
            }
        }
    }

    #[test]
    fn a_frame_counts_its_own_length() {
        let mut out = Vec::new();
        put_command_complete(&mut out, "LISTEN");
        assert_eq!(out, b"C\0\0\0\x0bLISTEN\0");
    }
}
