//! Certificates by the `openssl` of this machine, and a Postgres that shows them: what tests of TLS begin with.

use std::path::{Path, PathBuf};
use std::process::Command;

use flowgate::embedded::{Cluster, ClusterOptions, connect};
use tempfile::TempDir;

use super::proxy::{PATIENCE, text};
use super::wait::wait_until;

/// A folder of certificates, gone with the test.
pub(crate) struct Certs(TempDir);

/// A certificate and its private key.
#[derive(Clone)]
pub(crate) struct Certificate {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

pub(crate) const EC: [&str; 4] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];

impl Certs {
    /// `None`, and a word about it, where there is no `openssl`.
    pub(crate) fn new() -> Option<Self> {
        if Command::new("openssl").arg("version").output().is_ok() {
            return Some(Self(TempDir::new().unwrap()));
        }
        println!("skipped: no `openssl` on this machine to make certificates with");
        None
    }

    /// Signed by itself, for this machine.
    pub(crate) fn own(&self, name: &str, algorithm: &[&str]) -> Certificate {
        let extensions = [
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "basicConstraints=critical,CA:FALSE",
        ];
        self.make(name, "/CN=localhost", algorithm, &extensions, None)
    }

    /// One that others can be signed by.
    pub(crate) fn authority(&self, name: &str) -> Certificate {
        let extensions = ["basicConstraints=critical,CA:TRUE"];
        self.make(name, &format!("/CN={name}"), &EC, &extensions, None)
    }

    /// For whoever is called `subject`, signed by `authority`.
    pub(crate) fn client(&self, subject: &str, authority: &Certificate) -> Certificate {
        let file = subject.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let by = authority.cert.file_stem().unwrap().to_str().unwrap();
        let extensions = ["basicConstraints=critical,CA:FALSE"];
        self.make(
            &format!("{file}-by-{by}"),
            &format!("/O=flowgate/CN={subject}"),
            &EC,
            &extensions,
            Some(authority),
        )
    }

    fn make(
        &self,
        name: &str,
        subject: &str,
        algorithm: &[&str],
        extensions: &[&str],
        authority: Option<&Certificate>,
    ) -> Certificate {
        let made = Certificate {
            cert: self.0.path().join(format!("{name}.pem")),
            key: self.0.path().join(format!("{name}.key")),
        };
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-nodes", "-days", "2", "-utf8"]);
        command.args(algorithm).args(["-subj", subject]);
        for extension in extensions {
            command.args(["-addext", extension]);
        }
        if let Some(authority) = authority {
            command.arg("-CA").arg(&authority.cert);
            command.arg("-CAkey").arg(&authority.key);
        }
        let output = command
            .arg("-out")
            .arg(&made.cert)
            .arg("-keyout")
            .arg(&made.key)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        made
    }
}

/// A cluster that offers TLS with this certificate, and takes those of clients that `authority` has signed.
pub(crate) async fn tls_cluster(
    certificate: &Certificate,
    authority: Option<&Certificate>,
    password: Option<&str>,
) -> Cluster {
    let cluster = Cluster::start(ClusterOptions {
        replicas: 0,
        password: password.map(str::to_owned),
        ..ClusterOptions::default()
    })
    .await
    .unwrap();
    let admin = cluster.connect_primary().await.unwrap();
    // Postgres wants the key to be its own and nobody else's: written by the server itself, whoever runs this test.
    let data = text(&admin, "show data_directory").await;
    let files = [
        ("server.crt", Some(&certificate.cert)),
        ("server.key", Some(&certificate.key)),
        ("root.crt", authority.map(|authority| &authority.cert)),
    ];
    for (name, from) in files {
        let Some(from) = from else { continue };
        let pem = std::fs::read_to_string(from).unwrap();
        let copy = format!(
            "copy (select unnest(string_to_array('{}', E'\\n'))) to '{data}/{name}'",
            pem.trim()
        );
        admin.batch_execute(&copy).await.unwrap();
    }
    let mode =
        format!("copy (select 1) to program 'cat >/dev/null; chmod 600 \"{data}/server.key\"'");
    admin.batch_execute(&mode).await.unwrap();
    if authority.is_some() {
        admin
            .batch_execute("alter system set ssl_ca_file = 'root.crt'")
            .await
            .unwrap();
    }
    for sql in ["alter system set ssl = on", "select pg_reload_conf()"] {
        admin.batch_execute(sql).await.unwrap();
    }
    let url = cluster.primary_url();
    wait_until("TLS is on", PATIENCE, async || {
        text(&connect(&url).await.unwrap(), "show ssl").await == "on"
    })
    .await;
    cluster
}

/// Gives the cluster another pg_hba.conf; before these lines, a superuser `door` is let in however it comes. The first call
/// must find a way in for `postgres`.
pub(crate) async fn set_hba(cluster: &Cluster, lines: &[&str]) {
    let url: flowgate::config::ConnectUrl = cluster.primary_url().parse().unwrap();
    let door = format!("postgres://door@{}/postgres", url.addr());
    let admin = match connect(&door).await {
        Ok(admin) => admin,
        Err(_first_time) => {
            let admin = cluster.connect_primary().await.unwrap();
            admin
                .batch_execute("create role door superuser login")
                .await
                .unwrap();
            admin
        }
    };
    let data = text(&admin, "show data_directory").await;
    let loaded = text(&admin, "select pg_conf_load_time()").await;
    let lines = [&["host all door 127.0.0.1/32 trust"], lines]
        .concat()
        .join("\n");
    let copy = format!(
        "copy (select unnest(string_to_array('{lines}', E'\\n'))) to '{data}/pg_hba.conf'; select pg_reload_conf()"
    );
    for sql in copy.split("; ") {
        admin.batch_execute(sql).await.unwrap();
    }
    wait_until(
        "pg_hba.conf is in force",
        PATIENCE,
        async || match connect(&door).await {
            Ok(later) => text(&later, "select pg_conf_load_time()").await != loaded,
            Err(_not_yet) => false,
        },
    )
    .await;
}

/// Runs `psql`; `Err` is what it said. `None`: there is none here.
pub(crate) async fn psql(conninfo: &str, sql: &str) -> Option<Result<String, String>> {
    let output = tokio::process::Command::new("psql")
        .args([conninfo, "-XAtc", sql])
        .kill_on_drop(true)
        .output();
    let Ok(output) = tokio::time::timeout(PATIENCE, output).await.unwrap() else {
        println!("skipped: no `psql` on this machine");
        return None;
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
    Some(if output.status.success() {
        Ok(text(output.stdout))
    } else {
        Err(text(output.stderr))
    })
}

/// For libpq: a certificate of the client's own.
pub(crate) fn with_certificate(certificate: &Certificate) -> String {
    let readable_by_us_alone = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&certificate.key, readable_by_us_alone).unwrap();
    format!(
        "sslcert={} sslkey={}",
        show(&certificate.cert),
        show(&certificate.key)
    )
}

pub(crate) fn show(path: &Path) -> String {
    path.display().to_string()
}
