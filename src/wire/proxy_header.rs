//! The PROXY header a balancer sends ahead of a connection: who the client is, in version 1 (a line) or 2 (binary). Pure: says
//! what to read next and what was read. Whom to believe, `client/proxy.rs` decides.
//! (HAProxy, "The PROXY protocol, versions 1 & 2", sections 2.1 and 2.2)

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use thiserror::Error;

/// Either version has more bytes than that, and these tell which it is.
pub(crate) const BEGINNING: usize = 12;
/// The longest line of version 1, its end included.
pub(crate) const LINE_MAX: usize = 107;
/// The fixed part of version 2.
pub(crate) const HEAD: usize = 16;
/// Addresses of version 2 that mean something to us: two of IPv6 with their ports. What follows is skipped.
pub(crate) const ADDRESSES_MAX: usize = 36;

const SIGNATURE: [u8; BEGINNING] = *b"\r\n\r\n\0\r\nQUIT\n";
const WORD: &[u8] = b"PROXY ";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Line,
    Binary,
}

/// For whom the connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// For the balancer itself (its health checks), or for somebody it cannot name.
    Itself,
    Client(SocketAddr),
}

#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("malformed PROXY header")]
pub(crate) struct Malformed;

/// What a header that begins so is; `None` while that cannot be told. Fails as soon as it cannot be one.
pub(crate) fn version(beginning: &[u8]) -> Result<Option<Version>, Malformed> {
    let begins = |whole: &[u8]| {
        let both = beginning.len().min(whole.len());
        beginning.get(..both) == whole.get(..both)
    };
    if begins(WORD) {
        Ok((beginning.len() >= WORD.len()).then_some(Version::Line))
    } else if begins(&SIGNATURE) {
        Ok((beginning.len() >= SIGNATURE.len()).then_some(Version::Binary))
    } else {
        Err(Malformed)
    }
}

/// Reads a line of version 1, with its CR LF.
pub(crate) fn read_line(line: &[u8]) -> Result<Source, Malformed> {
    let line = line.strip_suffix(b"\r\n").ok_or(Malformed)?;
    let line = std::str::from_utf8(line).map_err(|_not_ascii| Malformed)?;
    let line = line.strip_prefix("PROXY ").ok_or(Malformed)?;
    let mut words = line.split(' ');
    let family = words.next().ok_or(Malformed)?;
    if family == "UNKNOWN" {
        // Whatever follows is to be ignored.
        return Ok(Source::Itself);
    }
    let (Some(source), Some(destination), Some(port), Some(to_port), None) = (
        words.next(),
        words.next(),
        words.next(),
        words.next(),
        words.next(),
    ) else {
        return Err(Malformed);
    };
    let address = |text: &str| -> Result<IpAddr, Malformed> {
        let address = match family {
            "TCP4" => text.parse().map(IpAddr::V4),
            "TCP6" => text.parse().map(IpAddr::V6),
            _ => return Err(Malformed),
        };
        address.map_err(|_no_address| Malformed)
    };
    let (source, _) = (address(source)?, address(destination)?);
    let (port, _) = (read_port(port)?, read_port(to_port)?);
    Ok(Source::Client(SocketAddr::new(source, port)))
}

fn read_port(text: &str) -> Result<u16, Malformed> {
    // `parse` would take a sign.
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().map_err(|_no_port| Malformed)
    } else {
        Err(Malformed)
    }
}

/// The rest of a header of version 2 after its fixed part: how many bytes there are.
pub(crate) fn rest_len(head: &[u8; HEAD]) -> Result<usize, Malformed> {
    let [.., command, _, high, low] = *head;
    if !head.starts_with(&SIGNATURE) || !matches!(command, 0x20 | 0x21) {
        return Err(Malformed);
    }
    Ok(usize::from(u16::from_be_bytes([high, low])))
}

/// Reads a header of version 2: its fixed part and the first bytes of its rest, `ADDRESSES_MAX` or all there are.
pub(crate) fn read_binary(head: &[u8; HEAD], rest: &[u8]) -> Result<Source, Malformed> {
    rest_len(head)?;
    let [.., command, family, _, _] = *head;
    // LOCAL: the balancer for itself; addresses, if any, mean nothing.
    if command == 0x20 {
        return Ok(Source::Itself);
    }
    let client = match family {
        // TCP over IPv4: source, destination, source port, destination port.
        0x11 => {
            let (&[a, b, c, d, _, _, _, _, high, low, _, _], _) =
                rest.split_first_chunk::<12>().ok_or(Malformed)?;
            SocketAddr::new(
                Ipv4Addr::new(a, b, c, d).into(),
                u16::from_be_bytes([high, low]),
            )
        }
        0x21 => {
            let (source, rest) = rest.split_first_chunk::<16>().ok_or(Malformed)?;
            let (_, rest) = rest.split_first_chunk::<16>().ok_or(Malformed)?;
            let (&[high, low, _, _], _) = rest.split_first_chunk::<4>().ok_or(Malformed)?;
            SocketAddr::new(
                Ipv6Addr::from(*source).into(),
                u16::from_be_bytes([high, low]),
            )
        }
        // Unspecified, a datagram, a Unix socket: nobody with an address.
        0x00 | 0x12 | 0x22 | 0x31 | 0x32 => return Ok(Source::Itself),
        _ => return Err(Malformed),
    };
    Ok(Source::Client(client))
}

/// What we send ahead when we speak for ourselves: LOCAL, nothing more.
pub(crate) fn local() -> [u8; HEAD] {
    let mut head = [0; HEAD];
    let fixed = SIGNATURE.iter().chain(&[0x20, 0, 0, 0]);
    head.iter_mut()
        .zip(fixed)
        .for_each(|(slot, byte)| *slot = *byte);
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(command: u8, family: u8, rest: &[u8]) -> Result<Source, Malformed> {
        let mut head = local();
        head[12] = command;
        head[13] = family;
        head[14..].copy_from_slice(&u16::try_from(rest.len()).unwrap().to_be_bytes());
        assert_eq!(rest_len(&head).map(|len| len == rest.len()), Ok(true));
        read_binary(&head, rest)
    }

    fn client(text: &str) -> Result<Source, Malformed> {
        Ok(Source::Client(text.parse().unwrap()))
    }

    #[test]
    fn lines_name_their_client() {
        let table: [(&[u8], Result<Source, Malformed>); 14] = [
            (
                b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 6432\r\n",
                client("192.0.2.7:4711"),
            ),
            (
                b"PROXY TCP6 2001:db8::7 ::1 4711 6432\r\n",
                client("[2001:db8::7]:4711"),
            ),
            (b"PROXY UNKNOWN\r\n", Ok(Source::Itself)),
            (b"PROXY UNKNOWN whatever it says\r\n", Ok(Source::Itself)),
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 6432\n", Err(Malformed)),
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 4711\r\n", Err(Malformed)),
            (
                b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 6432 1\r\n",
                Err(Malformed),
            ),
            (b"PROXY TCP4 ::1 10.0.0.1 4711 6432\r\n", Err(Malformed)),
            (b"PROXY TCP6 10.0.0.1 ::1 4711 6432\r\n", Err(Malformed)),
            (
                b"PROXY TCP4 192.0.2.7 10.0.0.1 +711 6432\r\n",
                Err(Malformed),
            ),
            (
                b"PROXY TCP4 192.0.2.7 10.0.0.1 65536 6432\r\n",
                Err(Malformed),
            ),
            (b"PROXY  TCP4 192.0.2.7 10.0.0.1 1 2\r\n", Err(Malformed)),
            (b"PROXY UDP4 192.0.2.7 10.0.0.1 1 2\r\n", Err(Malformed)),
            (b"PROXY \xff\r\n", Err(Malformed)),
        ];
        for (line, wanted) in table {
            assert_eq!(read_line(line), wanted, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn binary_headers_name_their_client() {
        let four = [192, 0, 2, 7, 10, 0, 0, 1, 0x12, 0x67, 0x19, 0x20];
        assert_eq!(binary(0x21, 0x11, &four), client("192.0.2.7:4711"));
        let with_more = [&four[..], &[4, 0, 1, 0]].concat();
        assert_eq!(binary(0x21, 0x11, &with_more), client("192.0.2.7:4711"));
        let mut six = [0; 36];
        six[..2].copy_from_slice(&[0x20, 1]);
        six[15] = 7;
        six[32..34].copy_from_slice(&4711u16.to_be_bytes());
        assert_eq!(binary(0x21, 0x21, &six), client("[2001::7]:4711"));
        assert_eq!(binary(0x20, 0x11, &four), Ok(Source::Itself));
        assert_eq!(binary(0x20, 0, &[]), Ok(Source::Itself));
        assert_eq!(binary(0x21, 0, &[]), Ok(Source::Itself));
        assert_eq!(binary(0x21, 0x31, &[0; 216]), Ok(Source::Itself));
        assert_eq!(binary(0x21, 0x11, &four[..11]), Err(Malformed));
        assert_eq!(binary(0x21, 0x21, &six[..35]), Err(Malformed));
        assert_eq!(binary(0x21, 0x44, &six), Err(Malformed));
        let mut head = local();
        head[12] = 0x11;
        assert_eq!(rest_len(&head), Err(Malformed));
        assert_eq!(read_binary(&local(), &[]), Ok(Source::Itself));
    }

    #[test]
    fn what_is_no_header_is_found_out_at_once() {
        assert_eq!(version(b""), Ok(None));
        assert_eq!(version(b"P"), Ok(None));
        assert_eq!(version(b"PROXY TCP4 1"), Ok(Some(Version::Line)));
        assert_eq!(version(&local()[..11]), Ok(None));
        assert_eq!(version(&local()[..12]), Ok(Some(Version::Binary)));
        assert_eq!(version(&[0, 0, 0, 8]), Err(Malformed));
        assert_eq!(version(b"PRX"), Err(Malformed));
        assert_eq!(version(b"\r\n\r\n\0\r\nQUIX"), Err(Malformed));
    }
}
