//! The untagged packets that open a connection, and what a StartupMessage asks for.
//! (protocol-flow.html#PROTOCOL-FLOW-START-UP, protocol-message-formats.html)

use thiserror::Error;

/// `MAX_STARTUP_PACKET_LENGTH` of Postgres.
const LENGTH_MAX: usize = 10_000;

const PROTOCOL_MAJOR: u32 = 3;
/// The newest minor we speak: 3.2 has variable-length cancel keys.
pub(crate) const PROTOCOL_MINOR_MAX: u16 = 2;

const CANCEL: (u32, u16) = (1234, 5678);
/// A CancelRequest from one Flowgate to another, alike but for this. Postgres knows no such code and hangs up.
const FORWARDED_CANCEL: (u32, u16) = (1234, 5778);

/// What an untagged packet is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Packet {
    SslRequest,
    GssEncRequest,
    Cancel {
        pid: u32,
        secret: Vec<u8>,
        /// It comes from another Flowgate, which does not know the key: not to be passed on again.
        forwarded: bool,
    },
    Startup(Startup),
}

/// A StartupMessage.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Startup {
    /// Minor version asked for; the major one is 3.
    pub(crate) minor: u16,
    /// Names and values in the order sent.
    pub(crate) parameters: Vec<(String, String)>,
}

impl Startup {
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        // The last one wins, as in Postgres, which assigns them in turn.
        self.parameters
            .iter()
            .rev()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Why a packet was refused; the text is Postgres's own.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum StartupError {
    #[error("invalid length of startup packet")]
    Length,
    #[error("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2")]
    Version { major: u32, minor: u32 },
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Layout,
    #[error("no PostgreSQL user name specified in startup packet")]
    NoUser,
    #[error("startup parameters are not valid UTF-8")]
    NotUtf8,
    #[error("invalid value for parameter \"replication\": \"{0}\"")]
    Replication(String),
}

/// Length of the packet at the front of `bytes`, its own four bytes included; `None` while they are not all there.
pub(crate) fn packet_len(bytes: &[u8]) -> Result<Option<usize>, StartupError> {
    let Some((length, _)) = bytes.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*length) as usize;
    if (8..=LENGTH_MAX).contains(&length) {
        Ok(Some(length))
    } else {
        Err(StartupError::Length)
    }
}

/// A whole CancelRequest, as from one Flowgate to another.
pub(crate) fn forwarded_cancel(pid: u32, secret: &[u8]) -> Vec<u8> {
    let length = u32::try_from(12 + secret.len()).unwrap_or(u32::MAX);
    let (major, minor) = FORWARDED_CANCEL;
    let code = major << 16 | u32::from(minor);
    let head = [length, code, pid].map(u32::to_be_bytes);
    [head.as_flattened(), secret].concat()
}

/// Reads one whole packet.
pub(crate) fn read(packet: &[u8]) -> Result<Packet, StartupError> {
    let Some((&[_, _, _, _, c0, c1, c2, c3], rest)) = packet.split_first_chunk::<8>() else {
        return Err(StartupError::Length);
    };
    let (major, minor) = (
        u32::from(u16::from_be_bytes([c0, c1])),
        u16::from_be_bytes([c2, c3]),
    );
    match (major, minor) {
        CANCEL | FORWARDED_CANCEL => {
            let Some((pid, secret)) = rest.split_first_chunk::<4>() else {
                return Err(StartupError::Length);
            };
            if !(4..=256).contains(&secret.len()) {
                return Err(StartupError::Length);
            }
            Ok(Packet::Cancel {
                pid: u32::from_be_bytes(*pid),
                secret: secret.to_vec(),
                forwarded: (major, minor) == FORWARDED_CANCEL,
            })
        }
        (1234, 5679) => Ok(Packet::SslRequest),
        (1234, 5680) => Ok(Packet::GssEncRequest),
        (PROTOCOL_MAJOR, minor) => {
            read_parameters(rest).map(|parameters| Packet::Startup(Startup { minor, parameters }))
        }
        (major, minor) => Err(StartupError::Version {
            major,
            minor: u32::from(minor),
        }),
    }
}

fn read_parameters(mut rest: &[u8]) -> Result<Vec<(String, String)>, StartupError> {
    let mut parameters = Vec::new();
    loop {
        let name = take_cstr(&mut rest)?;
        if name.is_empty() {
            break;
        }
        let value = take_cstr(&mut rest)?;
        parameters.push((name, value));
    }
    if rest.is_empty() {
        Ok(parameters)
    } else {
        Err(StartupError::Layout)
    }
}

fn take_cstr(rest: &mut &[u8]) -> Result<String, StartupError> {
    let end = memchr::memchr(0, rest).ok_or(StartupError::Layout)?;
    let (text, after) = rest.split_at_checked(end).ok_or(StartupError::Layout)?;
    *rest = after.get(1..).unwrap_or_default();
    String::from_utf8(text.to_vec()).map_err(|_not_utf8| StartupError::NotUtf8)
}

/// What `replication` in a StartupMessage asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplicationMode {
    /// `true`: WAL and base backups of the whole server.
    Physical,
    /// `database`: logical decoding in that database, and SQL.
    Logical,
}

/// Reads the value of `replication`; `None`: an ordinary session. As Postgres reads it, booleans in any of its spellings.
/// (protocol-replication.html)
pub(crate) fn replication(value: &str) -> Result<Option<ReplicationMode>, StartupError> {
    if value == "database" {
        return Ok(Some(ReplicationMode::Logical));
    }
    match boolean(value) {
        Some(true) => Ok(Some(ReplicationMode::Physical)),
        Some(false) => Ok(None),
        None => Err(StartupError::Replication(value.to_owned())),
    }
}

/// `parse_bool`: any beginning of a word that is no other's, in any case.
fn boolean(text: &str) -> Option<bool> {
    let text = text.to_ascii_lowercase();
    let begins = |word: &str, shortest: usize| text.len() >= shortest && word.starts_with(&text);
    if text == "1" || begins("true", 1) || begins("yes", 1) || begins("on", 2) {
        Some(true)
    } else if text == "0" || begins("false", 1) || begins("no", 1) || begins("off", 2) {
        Some(false)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replication_is_a_boolean_or_a_database() {
        for (value, mode) in [
            ("database", Some(ReplicationMode::Logical)),
            ("true", Some(ReplicationMode::Physical)),
            ("TRUE", Some(ReplicationMode::Physical)),
            ("t", Some(ReplicationMode::Physical)),
            ("on", Some(ReplicationMode::Physical)),
            ("yes", Some(ReplicationMode::Physical)),
            ("1", Some(ReplicationMode::Physical)),
            ("false", None),
            ("of", None),
            ("No", None),
            ("0", None),
        ] {
            assert_eq!(replication(value), Ok(mode), "{value}");
        }
        for value in ["", "o", "Database", "2", "truer", "database "] {
            assert!(replication(value).is_err(), "{value}");
        }
    }

    #[test]
    fn a_forwarded_cancel_is_read_as_one() {
        assert_eq!(
            read(&forwarded_cancel(7, &[1; 32])),
            Ok(Packet::Cancel {
                pid: 7,
                secret: vec![1; 32],
                forwarded: true
            })
        );
    }

    fn packet(code: u32, rest: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(8 + rest.len())
            .unwrap()
            .to_be_bytes()
            .to_vec();
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(rest);
        bytes
    }

    #[test]
    fn reads_each_kind() {
        assert_eq!(read(&packet(80_877_103, b"")), Ok(Packet::SslRequest));
        assert_eq!(read(&packet(80_877_104, b"")), Ok(Packet::GssEncRequest));
        let cancel = Packet::Cancel {
            pid: 7,
            secret: vec![1, 2, 3, 4],
            forwarded: false,
        };
        assert_eq!(
            read(&packet(80_877_102, &[0, 0, 0, 7, 1, 2, 3, 4])),
            Ok(cancel)
        );
        let parameters = vec![("user".to_owned(), "bob".to_owned())];
        assert_eq!(
            read(&packet(196_610, b"user\0bob\0\0")),
            Ok(Packet::Startup(Startup {
                minor: 2,
                parameters
            }))
        );
    }

    #[test]
    fn refuses_what_postgres_refuses() {
        assert_eq!(
            read(&packet(0x0002_0000, b"")),
            Err(StartupError::Version { major: 2, minor: 0 })
        );
        assert_eq!(
            read(&packet(196_608, b"user\0bob")),
            Err(StartupError::Layout)
        );
        assert_eq!(
            read(&packet(196_608, b"user\0bob\0\0x")),
            Err(StartupError::Layout)
        );
        assert_eq!(packet_len(&[0, 0, 0, 7]), Err(StartupError::Length));
        assert_eq!(packet_len(&[0x7f, 0, 0, 7]), Err(StartupError::Length));
    }
}
