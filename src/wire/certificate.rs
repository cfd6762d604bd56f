//! The little of an X.509 certificate that logins need: the hash that stands for it in channel binding, and its common name.
//! Reads DER and checks no signature: rustls has done so where it matters. Pure; what is malformed has neither.
//! (RFC 5280, 4.1; RFC 5929, 4.1)

use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
/// `[0]`, constructed: the version, where it is said; the hash, in the parameters of RSASSA-PSS.
const CONTEXT_0: u8 = 0xa0;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;

/// 2.5.4.3
const COMMON_NAME: &[u8] = &[0x55, 4, 3];
/// 1.2.840.113549.1.1, PKCS #1; the last number says which.
const PKCS_1: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1];
/// 1.2.840.10045.4, ECDSA.
const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4];
/// 2.16.840.1.101.3.4.2, NIST's hashes.
const NIST_HASH: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2];
/// 1.3.14.3.2.26
const SHA_1: &[u8] = &[0x2b, 0x0e, 3, 2, 0x1a];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    /// Also in place of MD5 and SHA-1, which are too weak to bind with.
    Sha256,
    Sha224,
    Sha384,
    Sha512,
}

/// The `tls-server-end-point` of a certificate: its hash, by the hash of its own signature. `None` where that signature
/// has none of its own (Ed25519) or one we don't know.
pub(crate) fn end_point(der: &[u8]) -> Option<Vec<u8>> {
    let certificate = Der(der).take(SEQUENCE)?;
    let mut parts = Der(certificate);
    parts.take(SEQUENCE)?;
    let hash = signature_hash(parts.take(SEQUENCE)?)?;
    Some(match hash {
        Hash::Sha224 => Sha224::digest(der).to_vec(),
        Hash::Sha256 => Sha256::digest(der).to_vec(),
        Hash::Sha384 => Sha384::digest(der).to_vec(),
        Hash::Sha512 => Sha512::digest(der).to_vec(),
    })
}

/// The common name of whom the certificate is for: the first, if there are several.
pub(crate) fn common_name(der: &[u8]) -> Option<&str> {
    let certificate = Der(der).take(SEQUENCE)?;
    let mut parts = Der(Der(certificate).take(SEQUENCE)?);
    parts.take(CONTEXT_0);
    // Serial number, signature, issuer, validity.
    for _ in 0..4 {
        parts.any()?;
    }
    let mut names = Der(parts.take(SEQUENCE)?);
    while let Some(set) = names.take(SET) {
        let mut set = Der(set);
        while let Some(attribute) = set.take(SEQUENCE) {
            let mut attribute = Der(attribute);
            if attribute.take(OID)? != COMMON_NAME {
                continue;
            }
            let (tag, text) = attribute.any()?;
            return match tag {
                UTF8_STRING | PRINTABLE_STRING | IA5_STRING => std::str::from_utf8(text)
                    .ok()
                    .filter(|text| !text.contains('\0')),
                _ => None,
            };
        }
    }
    None
}

/// The hash an AlgorithmIdentifier's contents name.
fn signature_hash(algorithm: &[u8]) -> Option<Hash> {
    let mut parts = Der(algorithm);
    let oid = parts.take(OID)?;
    if let Some(which) = oid.strip_prefix(PKCS_1) {
        return match which {
            // With MD5, with SHA-1.
            [4] | [5] => Some(Hash::Sha256),
            // RSASSA-PSS says which in its parameters; unsaid, it is SHA-1.
            [10] => {
                let Some(parameters) = parts.take(SEQUENCE) else {
                    return Some(Hash::Sha256);
                };
                match Der(parameters).take(CONTEXT_0) {
                    None => Some(Hash::Sha256),
                    Some(hash) => named_hash(Der(Der(hash).take(SEQUENCE)?).take(OID)?),
                }
            }
            [11] => Some(Hash::Sha256),
            [12] => Some(Hash::Sha384),
            [13] => Some(Hash::Sha512),
            [14] => Some(Hash::Sha224),
            _ => None,
        };
    }
    match oid.strip_prefix(ECDSA)? {
        // With SHA-1.
        [1] => Some(Hash::Sha256),
        [3, 1] => Some(Hash::Sha224),
        [3, 2] => Some(Hash::Sha256),
        [3, 3] => Some(Hash::Sha384),
        [3, 4] => Some(Hash::Sha512),
        _ => None,
    }
}

fn named_hash(oid: &[u8]) -> Option<Hash> {
    if oid == SHA_1 {
        return Some(Hash::Sha256);
    }
    match oid.strip_prefix(NIST_HASH)? {
        [1] => Some(Hash::Sha256),
        [2] => Some(Hash::Sha384),
        [3] => Some(Hash::Sha512),
        [4] => Some(Hash::Sha224),
        _ => None,
    }
}

/// DER elements, one after the other.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The contents of the next element if it is of this kind; otherwise it stays.
    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        if self.0.first() != Some(&tag) {
            return None;
        }
        self.any().map(|(_, contents)| contents)
    }

    /// The next element's tag and contents.
    fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, first], rest) = self.0.split_first_chunk::<2>()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            // So many bytes of length follow; a certificate needs no more than three.
            0x81..=0x83 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
                let length = bytes
                    .iter()
                    .fold(0, |length, &byte| length << 8 | usize::from(byte));
                (length, rest)
            }
            _ => return None,
        };
        let (contents, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, contents))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(tag: u8, contents: &[u8]) -> Vec<u8> {
        let length = u8::try_from(contents.len()).unwrap();
        let mut out = if length < 0x80 {
            vec![tag, length]
        } else {
            vec![tag, 0x81, length]
        };
        out.extend_from_slice(contents);
        out
    }

    fn certificate(subject: &[u8], algorithm: &[u8]) -> Vec<u8> {
        let tbs = [
            element(CONTEXT_0, &[2, 1, 2]),
            element(2, &[7]),
            element(SEQUENCE, algorithm),
            element(SEQUENCE, &[]),
            element(SEQUENCE, &[]),
            element(SEQUENCE, subject),
        ]
        .concat();
        let whole = [
            element(SEQUENCE, &tbs),
            element(SEQUENCE, algorithm),
            element(3, &[0, 1, 2]),
        ]
        .concat();
        element(SEQUENCE, &whole)
    }

    fn named(oid: &[u8], tag: u8, text: &[u8]) -> Vec<u8> {
        element(
            SET,
            &element(SEQUENCE, &[element(OID, oid), element(tag, text)].concat()),
        )
    }

    #[test]
    fn each_signature_has_its_hash() {
        let rsa = |which: u8| element(OID, &[PKCS_1, &[which]].concat());
        let ecdsa = |which: &[u8]| element(OID, &[ECDSA, which].concat());
        let pss = |hash: &[u8]| {
            let hash = element(CONTEXT_0, &element(SEQUENCE, &element(OID, hash)));
            [rsa(10), element(SEQUENCE, &hash)].concat()
        };
        for (algorithm, length) in [
            (rsa(4), Some(32)),
            (rsa(5), Some(32)),
            (rsa(11), Some(32)),
            (rsa(12), Some(48)),
            (rsa(13), Some(64)),
            (rsa(14), Some(28)),
            (ecdsa(&[1]), Some(32)),
            (ecdsa(&[3, 2]), Some(32)),
            (ecdsa(&[3, 3]), Some(48)),
            (ecdsa(&[3, 4]), Some(64)),
            (rsa(10), Some(32)),
            (pss(SHA_1), Some(32)),
            (pss(&[NIST_HASH, &[2]].concat()), Some(48)),
            (pss(&[NIST_HASH, &[3]].concat()), Some(64)),
            (pss(&[NIST_HASH, &[9]].concat()), None),
            (rsa(99), None),
            // Ed25519
            (element(OID, &[0x2b, 0x65, 0x70]), None),
        ] {
            let hash = end_point(&certificate(&[], &algorithm));
            assert_eq!(hash.map(|hash| hash.len()), length, "{algorithm:02x?}");
        }
    }

    #[test]
    fn the_common_name_is_found_among_the_names() {
        let organisation = named(&[0x55, 4, 10], UTF8_STRING, b"flowgate");
        for (tag, text, found) in [
            (UTF8_STRING, "älice".as_bytes(), Some("älice")),
            (PRINTABLE_STRING, b"alice", Some("alice")),
            (UTF8_STRING, b"ali\0ce", None),
            (UTF8_STRING, b"\xff", None),
            (0x1e, b"\0a", None),
        ] {
            let subject = [organisation.clone(), named(COMMON_NAME, tag, text)].concat();
            assert_eq!(common_name(&certificate(&subject, &[])), found);
        }
        assert_eq!(common_name(&certificate(&organisation, &[])), None);
    }

    #[test]
    fn what_is_cut_short_has_nothing() {
        let subject = named(COMMON_NAME, UTF8_STRING, b"alice");
        let whole = certificate(&subject, &element(OID, &[PKCS_1, &[11]].concat()));
        assert!(end_point(&whole).is_some());
        for cut in 0..whole.len() {
            let part = whole.get(..cut).unwrap();
            assert_eq!((end_point(part), common_name(part)), (None, None));
        }
        assert_eq!(end_point(&[SEQUENCE, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
