//! What stands between a socket and a login: certificates, whose PROXY headers are believed, who may come in and how. Made of the
//! configuration, read by `startup.rs` once a connection, and swapped whole: whoever is half-way in goes on by what it met.

use std::io;

use super::access::{self, Verdict, Visitor};
use super::tls::{self, Certificate};
use crate::config::{AccessRule, AuthMethod, Cidr, ClientTls, Config, ProxyProtocol};

pub(crate) struct Entrance {
    /// `None`: TLS is off.
    pub(super) certificate: Option<Certificate>,
    pub(super) tls: ClientTls,
    /// Those whose PROXY headers are believed, where every connection begins with one.
    pub(super) balancers: Option<Vec<Cidr>>,
    access: Vec<AccessRule>,
    /// For everybody, where there are no rules.
    method: AuthMethod,
}

impl Entrance {
    /// Reads the certificates; fails where they cannot be used.
    pub(crate) fn new(config: &Config) -> io::Result<Self> {
        let balancers = match config.listen.proxy_protocol {
            ProxyProtocol::Off => None,
            ProxyProtocol::Require => Some(config.listen.proxy_protocol_from.clone()),
        };
        // With rules, they say who needs a certificate.
        let from_everybody = config.access.is_empty();
        Ok(Self {
            certificate: tls::certificate(&config.listen, from_everybody)?,
            tls: config.listen.tls,
            balancers,
            access: config.access.clone(),
            method: config.auth.method,
        })
    }

    pub(super) fn judge<'a>(&'a self, visitor: &Visitor<'a>) -> Verdict<'a> {
        if !self.access.is_empty() {
            return access::judge(&self.access, visitor);
        }
        match self.method {
            AuthMethod::Scram => Verdict::Scram,
            AuthMethod::Trust => Verdict::Trust,
        }
    }
}
