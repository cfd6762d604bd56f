//! Who may come in and how, before any password is asked: the rules of `[[access]]` in order, as pg_hba.conf has it. Pure. Asked by
//! `startup.rs` once a login; what a refused client is told stands here too. (auth-pg-hba-conf.html; `hba.c`, `auth.c`)

use std::net::IpAddr;

use crate::config::{AccessMethod, AccessRule, AccessTls, Addresses, DatabaseName, Names};
use crate::wire::error_response::ErrorResponse;
use crate::wire::startup::ReplicationMode;

/// Who asks.
pub(super) struct Visitor<'a> {
    pub(super) address: IpAddr,
    pub(super) user: &'a str,
    pub(super) database: &'a str,
    pub(super) replication: Option<ReplicationMode>,
    pub(super) encrypted: bool,
}

/// What the first rule that fits demands.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict<'a> {
    Scram,
    Trust,
    /// A certificate with this common name.
    Cert(&'a str),
    Rejected,
    NoRule,
}

pub(super) fn judge<'a>(rules: &'a [AccessRule], visitor: &Visitor<'a>) -> Verdict<'a> {
    let Some(rule) = rules.iter().find(|rule| fits(rule, visitor)) else {
        return Verdict::NoRule;
    };
    match rule.method {
        AccessMethod::Scram => Verdict::Scram,
        AccessMethod::Trust => Verdict::Trust,
        AccessMethod::Cert => Verdict::Cert(rule.cert_name.as_deref().unwrap_or(visitor.user)),
        AccessMethod::Reject => Verdict::Rejected,
    }
}

fn fits(rule: &AccessRule, visitor: &Visitor<'_>) -> bool {
    let encrypted = match (rule.tls, rule.method) {
        // There is no certificate without TLS: Postgres has `cert` on hostssl lines only.
        (AccessTls::Require, _) | (AccessTls::Any, AccessMethod::Cert) => visitor.encrypted,
        (AccessTls::Any, _) => true,
    };
    let user = match &rule.user {
        Names::All => true,
        Names::Only(names) => names.iter().any(|name| name == visitor.user),
    };
    let address = match &rule.address {
        Addresses::All => true,
        Addresses::Only(ranges) => ranges.iter().any(|range| range.contains(visitor.address)),
    };
    let database = || {
        rule.database
            .iter()
            .any(|name| match (name, visitor.replication) {
                (DatabaseName::Replication, replication) => {
                    replication == Some(ReplicationMode::Physical)
                }
                (_, Some(ReplicationMode::Physical)) => false,
                (DatabaseName::All, _) => true,
                (DatabaseName::SameUser, _) => visitor.database == visitor.user,
                (DatabaseName::Named(name), _) => name == visitor.database,
            })
    };
    encrypted && user && address && database()
}

/// Postgres' words for whom no rule fits.
pub(super) fn no_rule(visitor: &Visitor<'_>) -> ErrorResponse {
    refusal("no pg_hba.conf entry for", visitor)
}

/// And for whom a rule turns away.
pub(super) fn rejected(visitor: &Visitor<'_>) -> ErrorResponse {
    let what = match visitor.replication {
        Some(ReplicationMode::Physical) => "pg_hba.conf rejects",
        Some(ReplicationMode::Logical) | None => "pg_hba.conf rejects connection for",
    };
    refusal(what, visitor)
}

fn refusal(what: &str, visitor: &Visitor<'_>) -> ErrorResponse {
    let Visitor {
        user,
        database,
        replication,
        encrypted,
        ..
    } = visitor;
    let host = visitor.address.to_canonical();
    let encryption = if *encrypted {
        "SSL encryption"
    } else {
        "no encryption"
    };
    let message = match replication {
        Some(ReplicationMode::Physical) => format!(
            "{what} replication connection {} host \"{host}\", user \"{user}\", {encryption}",
            if what.starts_with("no") {
                "from"
            } else {
                "for"
            }
        ),
        Some(ReplicationMode::Logical) | None => format!(
            "{what} host \"{host}\", user \"{user}\", database \"{database}\", {encryption}"
        ),
    };
    ErrorResponse::fatal("28000", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(method: AccessMethod) -> AccessRule {
        AccessRule {
            database: vec![DatabaseName::All],
            user: Names::All,
            address: Addresses::All,
            method,
            tls: AccessTls::Any,
            cert_name: None,
        }
    }

    fn only(names: &[&str]) -> Names {
        Names::Only(names.iter().map(|&name| name.to_owned()).collect())
    }

    const ALICE: Visitor<'static> = Visitor {
        address: IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 2, 3)),
        user: "alice",
        database: "app",
        replication: None,
        encrypted: false,
    };

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = [
            AccessRule {
                user: only(&["mallory"]),
                ..rule(AccessMethod::Reject)
            },
            AccessRule {
                address: Addresses::Only(vec!["127.0.0.0/8".parse().unwrap()]),
                ..rule(AccessMethod::Trust)
            },
            AccessRule {
                database: vec![
                    DatabaseName::SameUser,
                    DatabaseName::Named("app".to_owned()),
                ],
                ..rule(AccessMethod::Scram)
            },
        ];
        let local = "127.0.0.1".parse().unwrap();
        for (visitor, verdict) in [
            (ALICE, Verdict::Scram),
            (
                Visitor {
                    address: local,
                    ..ALICE
                },
                Verdict::Trust,
            ),
            (
                Visitor {
                    user: "mallory",
                    address: local,
                    ..ALICE
                },
                Verdict::Rejected,
            ),
            (
                Visitor {
                    database: "other",
                    ..ALICE
                },
                Verdict::NoRule,
            ),
            (
                Visitor {
                    database: "alice",
                    ..ALICE
                },
                Verdict::Scram,
            ),
        ] {
            assert_eq!(judge(&rules, &visitor), verdict);
        }
        assert_eq!(judge(&[], &ALICE), Verdict::NoRule);
    }

    #[test]
    fn certificates_and_demands_of_tls_are_for_the_encrypted() {
        let rules = [
            AccessRule {
                user: only(&["bob"]),
                cert_name: Some("robert".to_owned()),
                ..rule(AccessMethod::Cert)
            },
            AccessRule {
                user: only(&["alice"]),
                ..rule(AccessMethod::Cert)
            },
            AccessRule {
                tls: AccessTls::Require,
                ..rule(AccessMethod::Scram)
            },
        ];
        let encrypted = Visitor {
            encrypted: true,
            ..ALICE
        };
        assert_eq!(judge(&rules, &ALICE), Verdict::NoRule);
        assert_eq!(judge(&rules, &encrypted), Verdict::Cert("alice"));
        let bob = Visitor {
            user: "bob",
            ..encrypted
        };
        assert_eq!(judge(&rules, &bob), Verdict::Cert("robert"));
        let carol = Visitor {
            user: "carol",
            ..encrypted
        };
        assert_eq!(judge(&rules, &carol), Verdict::Scram);
    }

    #[test]
    fn physical_replication_is_no_database() {
        let everything = [rule(AccessMethod::Scram)];
        let replication = [AccessRule {
            database: vec![DatabaseName::Replication],
            ..rule(AccessMethod::Scram)
        }];
        let physical = Visitor {
            replication: Some(ReplicationMode::Physical),
            ..ALICE
        };
        let logical = Visitor {
            replication: Some(ReplicationMode::Logical),
            ..ALICE
        };
        assert_eq!(judge(&everything, &physical), Verdict::NoRule);
        assert_eq!(judge(&everything, &logical), Verdict::Scram);
        assert_eq!(judge(&replication, &physical), Verdict::Scram);
        assert_eq!(judge(&replication, &logical), Verdict::NoRule);
        assert_eq!(judge(&replication, &ALICE), Verdict::NoRule);
    }

    #[test]
    fn refusals_are_in_postgres_words() {
        let physical = Visitor {
            replication: Some(ReplicationMode::Physical),
            encrypted: true,
            address: "::ffff:10.1.2.3".parse().unwrap(),
            ..ALICE
        };
        for (error, message) in [
            (
                no_rule(&ALICE),
                "no pg_hba.conf entry for host \"10.1.2.3\", user \"alice\", database \"app\", no encryption",
            ),
            (
                rejected(&ALICE),
                "pg_hba.conf rejects connection for host \"10.1.2.3\", user \"alice\", database \"app\", no encryption",
            ),
            (
                no_rule(&physical),
                "no pg_hba.conf entry for replication connection from host \"10.1.2.3\", user \"alice\", SSL encryption",
            ),
            (
                rejected(&physical),
                "pg_hba.conf rejects replication connection for host \"10.1.2.3\", user \"alice\", SSL encryption",
            ),
        ] {
            assert_eq!((&*error.code, error.message.as_str()), ("28000", message));
        }
    }
}
