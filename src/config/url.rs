//! A Postgres connection URL, taken apart once: `postgres://user:pw@host:port/db?sslmode=…&sslrootcert=…`. Never dials,
//! never prints a password. `check.rs` parses the operator's; `server/` and the control connections read them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::Secret;

const DEFAULT_USER: &str = "postgres";
const DEFAULT_PORT: u16 = 5432;

/// Kept as they are in a URL we print: what RFC 3986 calls unreserved.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');
/// Paths stay readable.
const ESCAPED_PATH: &AsciiSet = &ESCAPED.remove(b'/');

/// Where a Postgres is and who we are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectUrl {
    /// A name or an address; IPv6 without its brackets.
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Option<Secret>,
    pub database: String,
    pub sslmode: SslMode,
    pub ssl_root_cert: Option<PathBuf>,
    /// Our certificate and its key, for servers that ask for one; both or neither.
    pub ssl_cert: Option<PathBuf>,
    pub ssl_key: Option<PathBuf>,
    pub ssl_negotiation: SslNegotiation,
    pub channel_binding: ChannelBinding,
}

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    /// Plain first, TLS if that is refused.
    Allow,
    #[default]
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// libpq's `sslnegotiation`: ask by SSLRequest, or begin with the handshake (PostgreSQL 17 and later).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SslNegotiation {
    #[default]
    Postgres,
    Direct,
}

/// libpq's `channel_binding`: whether SCRAM proves that both ends see the same TLS connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChannelBinding {
    Disable,
    #[default]
    Prefer,
    Require,
}

/// What is wrong with a URL. None of them repeats the text, which may hold a password.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectUrlError {
    #[error("is not a URL ({0}); write postgres://user:password@host:port/database")]
    Syntax(#[from] ::url::ParseError),
    #[error("starts with `{0}://`; write postgres://user:password@host:port/database")]
    Scheme(String),
    #[error("has no host; write postgres://user:password@host:port/database")]
    NoHost,
    #[error("names several hosts; write one, and each replica as a [[replica]] of its own")]
    SeveralHosts,
    #[error("names a Unix socket; Flowgate reaches Postgres by TCP, so name a host")]
    UnixSocket,
    #[error("has port 0; Postgres listens on 5432 unless told otherwise")]
    PortZero,
    #[error("has an unescaped `#`; in a user, password or database write it as %23")]
    Fragment,
    #[error("names more than a database after the host (a `/` inside its name is written %2F)")]
    Path,
    #[error("has a {0} that is not UTF-8 once its %-escapes are decoded")]
    NotUtf8(&'static str),
    #[error("has a zero byte in its {0}, which Postgres cannot carry")]
    ZeroByte(&'static str),
    #[error(
        "has sslmode `{0}`; it is one of disable, allow, prefer, require, verify-ca, verify-full"
    )]
    SslMode(String),
    #[error("has sslnegotiation `{0}`; it is postgres or direct")]
    SslNegotiation(String),
    #[error("has sslnegotiation direct, which needs sslmode require, verify-ca or verify-full")]
    DirectWithoutTls,
    #[error("has channel_binding `{0}`; it is disable, prefer or require")]
    ChannelBinding(String),
    #[error("has channel_binding require, which needs sslmode require, verify-ca or verify-full")]
    BindingWithoutTls,
    #[error("has only one of sslcert and sslkey; a certificate needs its key")]
    HalfCertificate,
    #[error(
        "has a parameter `{0}`; only sslmode, sslrootcert, sslcert, sslkey, sslnegotiation and channel_binding are understood"
    )]
    Parameter(String),
    #[error("says `{0}` twice")]
    Twice(&'static str),
}

impl ConnectUrl {
    /// `host:port`, as `TcpStream::connect` takes it.
    pub fn addr(&self) -> String {
        format!("{}:{}", self.bracketed_host(), self.port)
    }

    /// The same server and role, another database.
    #[must_use]
    pub fn with_database(&self, database: &str) -> Self {
        Self {
            database: database.to_owned(),
            ..self.clone()
        }
    }

    /// With the password, for `tokio_postgres::Config`. That crate knows no verifying `sslmode`, its TLS connector does
    /// the verifying: so `verify-*` reads `require` here, and the root certificate is the connector's business.
    pub fn conninfo(&self) -> String {
        let sslmode = match self.sslmode {
            SslMode::Disable => "disable",
            SslMode::Allow | SslMode::Prefer => "prefer",
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => "require",
        };
        let mut text = format!("postgres://{}", escape(&self.user));
        if let Some(password) = &self.password {
            text.push(':');
            text.push_str(&escape(password.expose()));
        }
        text + &format!(
            "@{}/{}?sslmode={sslmode}",
            self.addr(),
            escape(&self.database)
        )
    }

    fn bracketed_host(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        }
    }
}

/// Everything but the password.
impl fmt::Display for ConnectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "postgres://{}@{}/{}",
            escape(&self.user),
            self.addr(),
            escape(&self.database)
        )?;
        let mut parameters = Vec::new();
        if self.sslmode != SslMode::default() {
            parameters.push(format!("sslmode={}", self.sslmode));
        }
        for (name, path) in [
            ("sslrootcert", &self.ssl_root_cert),
            ("sslcert", &self.ssl_cert),
            ("sslkey", &self.ssl_key),
        ] {
            if let Some(path) = path {
                let path = path.to_string_lossy();
                let path = utf8_percent_encode(&path, ESCAPED_PATH);
                parameters.push(format!("{name}={path}"));
            }
        }
        match self.ssl_negotiation {
            SslNegotiation::Postgres => {}
            SslNegotiation::Direct => parameters.push("sslnegotiation=direct".to_owned()),
        }
        match self.channel_binding {
            ChannelBinding::Disable => parameters.push("channel_binding=disable".to_owned()),
            ChannelBinding::Prefer => {}
            ChannelBinding::Require => parameters.push("channel_binding=require".to_owned()),
        }
        for (index, parameter) in parameters.iter().enumerate() {
            write!(f, "{}{parameter}", if index == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

impl FromStr for ConnectUrl {
    type Err = ConnectUrlError;

    fn from_str(text: &str) -> Result<Self, ConnectUrlError> {
        // Before the parser, which would call these an empty host.
        let authority = text.split_once("://").map_or("", |(_, rest)| rest);
        let authority = authority.split(['/', '?', '#']).next().unwrap_or_default();
        if authority
            .rsplit('@')
            .next()
            .is_some_and(|host| host.to_ascii_lowercase().starts_with("%2f"))
        {
            return Err(ConnectUrlError::UnixSocket);
        }
        if authority.ends_with('@')
            || authority
                .rsplit('@')
                .next()
                .is_some_and(|host| host.starts_with(':'))
        {
            return Err(ConnectUrlError::NoHost);
        }
        if authority
            .rsplit('@')
            .next()
            .is_some_and(|hosts| hosts.contains(','))
        {
            return Err(ConnectUrlError::SeveralHosts);
        }

        let url = ::url::Url::parse(text)?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(ConnectUrlError::Scheme(url.scheme().to_owned()));
        }
        if url.fragment().is_some() {
            return Err(ConnectUrlError::Fragment);
        }
        let host = match url.host().ok_or(ConnectUrlError::NoHost)? {
            ::url::Host::Domain(name) => decode("host", name)?,
            ::url::Host::Ipv4(address) => address.to_string(),
            ::url::Host::Ipv6(address) => address.to_string(),
        };
        let port = url.port().unwrap_or(DEFAULT_PORT);
        if port == 0 {
            return Err(ConnectUrlError::PortZero);
        }
        let user = match url.username() {
            "" => DEFAULT_USER.to_owned(),
            user => decode("user", user)?,
        };
        let password = url
            .password()
            .map(|password| decode("password", password))
            .transpose()?;
        let database = match url.path().trim_start_matches('/') {
            "" => user.clone(),
            path if path.contains('/') => return Err(ConnectUrlError::Path),
            path => decode("database", path)?,
        };
        let Parameters {
            sslmode,
            ssl_root_cert,
            ssl_cert,
            ssl_key,
            ssl_negotiation,
            channel_binding,
        } = parameters(&url)?;
        let sslmode = sslmode.unwrap_or_default();
        let ssl_negotiation = ssl_negotiation.unwrap_or_default();
        let channel_binding = channel_binding.unwrap_or_default();
        let encrypted = match sslmode {
            SslMode::Disable | SslMode::Allow | SslMode::Prefer => false,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => true,
        };
        if ssl_negotiation == SslNegotiation::Direct && !encrypted {
            return Err(ConnectUrlError::DirectWithoutTls);
        }
        if channel_binding == ChannelBinding::Require && !encrypted {
            return Err(ConnectUrlError::BindingWithoutTls);
        }
        if ssl_cert.is_some() != ssl_key.is_some() {
            return Err(ConnectUrlError::HalfCertificate);
        }

        let password = password
            .filter(|password| !password.is_empty())
            .map(Secret::new);
        Ok(Self {
            host,
            port,
            user,
            password,
            database,
            sslmode,
            ssl_root_cert,
            ssl_cert,
            ssl_key,
            ssl_negotiation,
            channel_binding,
        })
    }
}

/// What stands behind the `?`.
#[derive(Default)]
struct Parameters {
    sslmode: Option<SslMode>,
    ssl_root_cert: Option<PathBuf>,
    ssl_cert: Option<PathBuf>,
    ssl_key: Option<PathBuf>,
    ssl_negotiation: Option<SslNegotiation>,
    channel_binding: Option<ChannelBinding>,
}

fn parameters(url: &::url::Url) -> Result<Parameters, ConnectUrlError> {
    let mut said = Parameters::default();
    // Not `query_pairs`: libpq escapes with % only, there a `+` is a plus.
    for pair in url
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
    {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decode("parameter", value)?;
        match name {
            "sslmode" => once("sslmode", &mut said.sslmode, value.parse()?)?,
            "sslrootcert" => once("sslrootcert", &mut said.ssl_root_cert, value.into())?,
            "sslcert" => once("sslcert", &mut said.ssl_cert, value.into())?,
            "sslkey" => once("sslkey", &mut said.ssl_key, value.into())?,
            "sslnegotiation" => {
                let word = match value.as_str() {
                    "postgres" => SslNegotiation::Postgres,
                    "direct" => SslNegotiation::Direct,
                    _ => return Err(ConnectUrlError::SslNegotiation(value)),
                };
                once("sslnegotiation", &mut said.ssl_negotiation, word)?;
            }
            "channel_binding" => {
                let word = match value.as_str() {
                    "disable" => ChannelBinding::Disable,
                    "prefer" => ChannelBinding::Prefer,
                    "require" => ChannelBinding::Require,
                    _ => return Err(ConnectUrlError::ChannelBinding(value)),
                };
                once("channel_binding", &mut said.channel_binding, word)?;
            }
            other => return Err(ConnectUrlError::Parameter(other.to_owned())),
        }
    }
    Ok(said)
}

fn once<T>(name: &'static str, slot: &mut Option<T>, value: T) -> Result<(), ConnectUrlError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_earlier) => Err(ConnectUrlError::Twice(name)),
    }
}

fn decode(part: &'static str, text: &str) -> Result<String, ConnectUrlError> {
    let text = percent_decode_str(text)
        .decode_utf8()
        .map_err(|_invalid| ConnectUrlError::NotUtf8(part))?;
    if text.contains('\0') {
        Err(ConnectUrlError::ZeroByte(part))
    } else {
        Ok(text.into_owned())
    }
}

fn escape(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

impl FromStr for SslMode {
    type Err = ConnectUrlError;

    fn from_str(text: &str) -> Result<Self, ConnectUrlError> {
        match text {
            "disable" => Ok(Self::Disable),
            "allow" => Ok(Self::Allow),
            "prefer" => Ok(Self::Prefer),
            "require" => Ok(Self::Require),
            "verify-ca" => Ok(Self::VerifyCa),
            "verify-full" => Ok(Self::VerifyFull),
            other => Err(ConnectUrlError::SslMode(other.to_owned())),
        }
    }
}

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disable => "disable",
            Self::Allow => "allow",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ConnectUrl {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn every_part_is_read_and_decoded() {
        let url = parse(
            "postgresql://al%40ice:p%2Fw%3A+%23@db.example:6000/my%20app?sslmode=verify-full&sslrootcert=/etc/ca.pem",
        );
        assert_eq!(url.host, "db.example");
        assert_eq!(url.port, 6000);
        assert_eq!(url.user, "al@ice");
        assert_eq!(url.password.as_ref().map(Secret::expose), Some("p/w:+#"));
        assert_eq!(url.database, "my app");
        assert_eq!(url.sslmode, SslMode::VerifyFull);
        assert_eq!(url.ssl_root_cert, Some(PathBuf::from("/etc/ca.pem")));
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let url = parse("postgres://db");
        assert_eq!(
            (url.user.as_str(), url.port, url.database.as_str()),
            ("postgres", 5432, "postgres")
        );
        assert_eq!(
            (url.password, url.sslmode, url.ssl_root_cert),
            (None, SslMode::Prefer, None)
        );
        assert_eq!(parse("postgres://carol@db/").database, "carol");
        assert_eq!(parse("postgres://carol:@db").password, None);
        assert_eq!(
            (
                parse("postgres://db").ssl_negotiation,
                parse("postgres://db").channel_binding
            ),
            (SslNegotiation::Postgres, ChannelBinding::Prefer)
        );
    }

    #[test]
    fn an_ipv6_host_loses_its_brackets_and_gets_them_back_in_addresses() {
        let url = parse("postgres://u@[::1]:5433/d");
        assert_eq!(url.host, "::1");
        assert_eq!(url.addr(), "[::1]:5433");
        assert_eq!(url.to_string(), "postgres://u@[::1]:5433/d");
    }

    #[test]
    fn the_password_shows_only_in_conninfo() {
        let url = parse("postgres://u:s3cr%40t@h/d?sslmode=verify-ca&sslrootcert=/ca%20s/x.pem");
        assert_eq!(
            url.to_string(),
            "postgres://u@h:5432/d?sslmode=verify-ca&sslrootcert=/ca%20s/x.pem"
        );
        assert!(!format!("{url:?}").contains("s3cr"), "{url:?}");
        assert_eq!(
            url.conninfo(),
            "postgres://u:s3cr%40t@h:5432/d?sslmode=require"
        );
    }

    #[test]
    fn printing_and_parsing_again_changes_nothing() {
        for text in [
            "postgres://a%20b@h:1/c%2Fd",
            "postgres://u@[fe80::1]/é?sslmode=disable",
            "postgres://h?sslrootcert=/x",
            "postgres://h?sslmode=allow",
            "postgres://h?sslmode=verify-full&sslrootcert=/x&sslcert=/c&sslkey=/k&sslnegotiation=direct&channel_binding=require",
            "postgres://h?channel_binding=disable",
        ] {
            let url = parse(text);
            assert_eq!(parse(&url.to_string()), url, "{text}");
        }
    }

    #[test]
    fn tokio_postgres_reads_our_conninfo() {
        for host in ["db.example", "10.0.0.1", "[::1]"] {
            let url = parse(&format!(
                "postgres://al%2Fice:p%40w%20%25@{host}:6000/my%20app?sslmode=verify-full"
            ));
            let config: tokio_postgres::Config = url.conninfo().parse().unwrap();
            assert_eq!(config.get_user(), Some("al/ice"));
            assert_eq!(config.get_password(), Some(b"p@w %".as_slice()));
            assert_eq!(config.get_dbname(), Some("my app"));
            assert_eq!(config.get_ports(), [6000]);
            assert_eq!(
                config.get_hosts(),
                [tokio_postgres::config::Host::Tcp(url.host.clone())]
            );
            assert_eq!(
                config.get_ssl_mode(),
                tokio_postgres::config::SslMode::Require
            );
        }
    }

    #[test]
    fn another_database_keeps_the_rest() {
        let url = parse("postgres://u:p@h/d?sslmode=require");
        assert_eq!(
            url.with_database("other"),
            parse("postgres://u:p@h/other?sslmode=require")
        );
    }

    #[test]
    fn each_wrong_piece_is_named() {
        use ConnectUrlError as E;
        let table: &[(&str, E)] = &[
            ("mysql://h/d", E::Scheme("mysql".into())),
            ("postgres://", E::NoHost),
            ("postgres:///db", E::NoHost),
            ("postgres://u@/db", E::NoHost),
            ("postgres://u@:5432/db", E::NoHost),
            ("postgres:db", E::NoHost),
            ("postgres://u@%2Fvar%2Frun/db", E::UnixSocket),
            ("postgres://a:1,b:2/d", E::SeveralHosts),
            (
                "postgres://h:99999/d",
                E::Syntax(::url::ParseError::InvalidPort),
            ),
            (
                "postgres://h:port/d",
                E::Syntax(::url::ParseError::InvalidPort),
            ),
            ("postgres://h:0/d", E::PortZero),
            (
                "postgres://[::1/d",
                E::Syntax(::url::ParseError::InvalidIpv6Address),
            ),
            ("db:5432/app", E::Scheme("db".into())),
            (
                "just words",
                E::Syntax(::url::ParseError::RelativeUrlWithoutBase),
            ),
            ("postgres://h/a/b", E::Path),
            ("postgres://h/d#x", E::Fragment),
            ("postgres://h/%ff", E::NotUtf8("database")),
            ("postgres://u:%ff@h/d", E::NotUtf8("password")),
            ("postgres://u%00@h/d", E::ZeroByte("user")),
            ("postgres://h/d?sslmode=on", E::SslMode("on".into())),
            ("postgres://h/d?sslnegotiation=direct", E::DirectWithoutTls),
            (
                "postgres://h/d?sslmode=require&sslnegotiation=now",
                E::SslNegotiation("now".into()),
            ),
            (
                "postgres://h/d?channel_binding=require",
                E::BindingWithoutTls,
            ),
            (
                "postgres://h/d?channel_binding=on",
                E::ChannelBinding("on".into()),
            ),
            ("postgres://h/d?sslcert=/c", E::HalfCertificate),
            ("postgres://h/d?sslcert=/c&sslcert=/c", E::Twice("sslcert")),
            (
                "postgres://h/d?application_name=x",
                E::Parameter("application_name".into()),
            ),
            (
                "postgres://h/d?sslmode=require&sslmode=disable",
                E::Twice("sslmode"),
            ),
        ];
        for (text, expected) in table {
            assert_eq!(
                text.parse::<ConnectUrl>().as_ref().err(),
                Some(expected),
                "{text}"
            );
        }
    }
}
