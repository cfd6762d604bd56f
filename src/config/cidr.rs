//! A range of addresses as operators write it: `10.0.0.0/8`, `::1`. Pure. `check.rs` parses them; whoever asks where a
//! client comes from compares.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Addresses that share their first `bits` bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

/// Not an address with or without `/bits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is no address; write \"10.0.0.0/8\", \"192.0.2.7\" or \"::1\"")]
pub struct NoCidr;

impl Cidr {
    /// Whether `address` lies inside. An IPv4 address is the same however its socket spells it (`::ffff:10.0.0.1`).
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                (ours.to_bits() ^ theirs.to_bits()) & mask == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                let mask = u128::MAX
                    .checked_shl(128 - u32::from(self.bits))
                    .unwrap_or(0);
                (ours.to_bits() ^ theirs.to_bits()) & mask == 0
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }

    /// Nobody outside this machine is inside.
    pub fn is_loopback(self) -> bool {
        match self.address {
            IpAddr::V4(_) => self.bits >= 8 && self.address.is_loopback(),
            IpAddr::V6(_) => self.bits == 128 && self.address.is_loopback(),
        }
    }
}

impl FromStr for Cidr {
    type Err = NoCidr;

    fn from_str(text: &str) -> Result<Self, NoCidr> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_not_one| NoCidr)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => most,
            // `parse` would take a sign.
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().map_err(|_not_a_number| NoCidr)?
            }
            Some(_) => return Err(NoCidr),
        };
        if bits > most {
            return Err(NoCidr);
        }
        // Kept as IPv4, which `contains` compares with.
        match address {
            IpAddr::V6(six) if bits >= 96 && six.to_ipv4_mapped().is_some() => Ok(Self {
                address: address.to_canonical(),
                bits: bits - 96,
            }),
            _ => Ok(Self { address, bits }),
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(_) if self.bits == 32 => write!(f, "{}", self.address),
            IpAddr::V6(_) if self.bits == 128 => write!(f, "{}", self.address),
            IpAddr::V4(_) | IpAddr::V6(_) => write!(f, "{}/{}", self.address, self.bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_what_shares_its_first_bits() {
        for (range, address, inside) in [
            ("10.0.0.0/8", "10.255.1.2", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("10.1.2.3/8", "10.9.9.9", true),
            ("0.0.0.0/0", "8.8.8.8", true),
            ("0.0.0.0/0", "::1", false),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.6", false),
            ("192.0.2.6/31", "192.0.2.7", true),
            ("::/0", "2001:db8::1", true),
            ("::/0", "127.0.0.1", false),
            ("2001:db8::/33", "2001:db8:7fff::", true),
            ("2001:db8::/33", "2001:db8:8000::", false),
            ("::1", "::1", true),
            ("10.0.0.0/8", "::ffff:10.2.3.4", true),
            ("::ffff:10.0.0.0/104", "10.2.3.4", true),
        ] {
            let parsed: Cidr = range.parse().unwrap();
            assert_eq!(
                parsed.contains(address.parse().unwrap()),
                inside,
                "{address} in {range}"
            );
        }
        assert!("127.0.0.0/8".parse::<Cidr>().unwrap().is_loopback());
        assert!(!"127.0.0.0/7".parse::<Cidr>().unwrap().is_loopback());
        assert!("::1".parse::<Cidr>().unwrap().is_loopback());
        assert!(!"::/0".parse::<Cidr>().unwrap().is_loopback());
        assert_eq!("::1".parse::<Cidr>().unwrap().to_string(), "::1");
        assert_eq!(
            "10.0.0.0/8".parse::<Cidr>().unwrap().to_string(),
            "10.0.0.0/8"
        );
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "all",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.0/8/8",
            "host",
        ] {
            assert_eq!(text.parse::<Cidr>(), Err(NoCidr), "{text}");
        }
    }
}
