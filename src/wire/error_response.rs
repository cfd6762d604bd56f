//! ErrorResponse and NoticeResponse: building ours, reading theirs.
//! (protocol-error-fields.html, "Error and Notice Message Fields")

use std::borrow::Cow;

use super::messages::{self, put_cstr};

/// An error we write ourselves. `message` in Postgres's style: lower case, no full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ErrorResponse {
    pub(crate) severity: Severity,
    pub(crate) code: Cow<'static, str>,
    pub(crate) message: String,
    pub(crate) detail: Option<String>,
    pub(crate) hint: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    Notice,
    Error,
    Fatal,
}

impl Severity {
    fn word(self) -> &'static str {
        match self {
            Self::Notice => "NOTICE",
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
        }
    }
}

impl ErrorResponse {
    pub(crate) fn error(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            code: code.into(),
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    /// No error at all: goes out as a NoticeResponse.
    pub(crate) fn notice(message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Notice,
            ..Self::error("00000", message)
        }
    }

    pub(crate) fn fatal(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Fatal,
            ..Self::error(code, message)
        }
    }

    pub(crate) fn with_detail(self, detail: impl Into<String>) -> Self {
        Self {
            detail: Some(detail.into()),
            ..self
        }
    }

    pub(crate) fn with_hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// Appends the whole frame.
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        let tag = match self.severity {
            Severity::Notice => b'N',
            Severity::Error | Severity::Fatal => b'E',
        };
        messages::put_frame(out, tag, |out| {
            let word = self.severity.word();
            let fields = [
                (b'S', word),
                (b'V', word),
                (b'C', &*self.code),
                (b'M', self.message.as_str()),
            ];
            let optional = [(b'D', self.detail.as_deref()), (b'H', self.hint.as_deref())];
            for (field, text) in fields
                .into_iter()
                .chain(optional.into_iter().filter_map(|(f, t)| Some((f, t?))))
            {
                out.push(field);
                put_cstr(out, text.as_bytes());
            }
            out.push(0);
        });
    }
}

/// The field `wanted` of an ErrorResponse's or NoticeResponse's body: `C` the SQLSTATE, `V` the severity, `M` the message …
pub(crate) fn field(mut body: &[u8], wanted: u8) -> Option<&[u8]> {
    while let Some((&name, rest)) = body.split_first() {
        if name == 0 {
            return None;
        }
        let end = memchr::memchr(0, rest)?;
        let (text, after) = rest.split_at_checked(end)?;
        if name == wanted {
            return Some(text);
        }
        body = after.get(1..)?;
    }
    None
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn what_we_write_we_read() {
        let mut out = Vec::new();
        ErrorResponse::fatal("57P01", "going away")
            .with_hint("Come back.")
            .put(&mut out);
        let body = &out[5..];
        assert_eq!(field(body, b'C'), Some(&b"57P01"[..]));
        assert_eq!(field(body, b'V'), Some(&b"FATAL"[..]));
        assert_eq!(field(body, b'H'), Some(&b"Come back."[..]));
        assert_eq!(field(body, b'D'), None);
        assert_eq!(field(&body[..3], b'C'), None);
    }
}
