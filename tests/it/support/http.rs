//! HTTP by hand: one request a connection, server-sent events as a browser reads them, and tokens.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use flowgate::config::{ApiKey, Config, Secret};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_postgres::Client;

use super::pg::TestDb;
use super::proxy::{PATIENCE, Proxy};

pub(crate) const SECRET: &str = "a secret of 32 bytes and a few more";
/// The API key of the role `Roles::viewer`.
pub(crate) const KEY: &str = "sb_publishable_test";

/// Roles of a test's own: they belong to the cluster, databases do not.
pub(crate) struct Roles {
    /// As `flowgate.grant_viewer` makes it: any run it knows the id of.
    pub(crate) viewer: String,
    /// May SELECT from all of pgflow's tables.
    pub(crate) reader: String,
    /// May nothing.
    pub(crate) nobody: String,
}

impl Roles {
    pub(crate) async fn make(db: &TestDb, client: &Client) -> Self {
        let role = |kind: &str| format!("{}_{kind}", db.name);
        let roles = Self {
            viewer: role("viewer"),
            reader: role("reader"),
            nobody: role("nobody"),
        };
        let Self {
            viewer,
            reader,
            nobody,
        } = &roles;
        client
            .batch_execute(&format!(
                "create role {viewer}; create role {reader}; create role {nobody}; \
                 select flowgate.grant_viewer('{viewer}'); \
                 grant usage on schema pgflow to {reader}; grant select on all tables in schema pgflow to {reader}; \
                 revoke execute on all functions in schema pgflow from public; select flowgate.grant_viewer('{viewer}')"
            ))
            .await
            .unwrap();
        roles
    }
}

/// A proxy that serves HTTP, with `SECRET` and `KEY`.
pub(crate) async fn serving(
    db: &TestDb,
    roles: &Roles,
    tweak: impl FnOnce(&mut Config),
) -> (Proxy, SocketAddr) {
    let proxy = Proxy::without_replica(db, |config| {
        config.listen.http = Some("127.0.0.1:0".parse().unwrap());
        config.http.jwt_secret = Some(Secret::new(SECRET.to_owned()));
        config.http.api_keys = vec![ApiKey {
            key: Secret::new(KEY.to_owned()),
            role: roles.viewer.clone(),
        }];
        tweak(config);
    })
    .await;
    let address = proxy.app().http.unwrap();
    (proxy, address)
}

pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_secs()
}

/// Signed with `SECRET`.
pub(crate) fn token(claims: &Value) -> String {
    let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let signed = format!(
        "{}.{}",
        encode(r#"{"alg":"HS256","typ":"JWT"}"#),
        encode(&claims.to_string())
    );
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET.as_bytes());
    let mark = ring::hmac::sign(&key, signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mark))
}

/// Of a role, for an hour.
pub(crate) fn token_of(role: &str) -> String {
    token(&serde_json::json!({ "role": role, "exp": now() + 3600 }))
}

pub(crate) fn bearer(role: &str) -> String {
    format!("authorization: Bearer {}", token_of(role))
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Reply {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// `status code` of what was refused.
    pub(crate) fn refusal(&self) -> String {
        let code = self.json()["code"].as_str().unwrap_or("?").to_owned();
        format!("{} {code}", self.status)
    }
}

pub(crate) async fn get(address: SocketAddr, path: &str, headers: &[&str]) -> Reply {
    ask(address, "GET", path, headers, "").await
}

pub(crate) async fn ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[&str],
    body: &str,
) -> Reply {
    let mut stream = Reading::open(address, method, path, headers, body).await;
    let (status, headers) = stream.head().await;
    let mut body = Vec::new();
    while let Some(piece) = stream.piece(&headers).await {
        body.extend(piece);
    }
    Reply {
        status,
        headers,
        body: String::from_utf8(body).unwrap(),
    }
}

/// What comes back for these bytes until the server closes.
pub(crate) async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = timeout(PATIENCE, socket.read_to_end(&mut answer));
    read.await.expect("an end").unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

struct Reading {
    socket: TcpStream,
    bytes: Vec<u8>,
    ended: bool,
}

impl Reading {
    async fn open(
        address: SocketAddr,
        method: &str,
        path: &str,
        headers: &[&str],
        body: &str,
    ) -> Self {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let mut request = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\n");
        for header in headers {
            request += header;
            request += "\r\n";
        }
        if !body.is_empty() {
            request += &format!("content-length: {}\r\n", body.len());
        }
        request += "connection: close\r\n\r\n";
        request += body;
        socket.write_all(request.as_bytes()).await.unwrap();
        Self {
            socket,
            bytes: Vec::new(),
            ended: false,
        }
    }

    /// More bytes; `false`: the end.
    async fn more(&mut self) -> bool {
        let read = timeout(PATIENCE, self.socket.read_buf(&mut self.bytes));
        let read = read.await.expect("bytes in time");
        read.is_ok_and(|count| count > 0)
    }

    async fn until(&mut self, mark: &[u8]) -> Vec<u8> {
        loop {
            let found = self
                .bytes
                .windows(mark.len())
                .position(|window| window == mark);
            if let Some(at) = found {
                let rest = self.bytes.split_off(at + mark.len());
                let mut head = std::mem::replace(&mut self.bytes, rest);
                head.truncate(at);
                return head;
            }
            assert!(self.more().await, "closed within {:?}", self.bytes);
        }
    }

    async fn head(&mut self) -> (u16, HashMap<String, String>) {
        let head = String::from_utf8(self.until(b"\r\n\r\n").await).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap()[9..12].parse().unwrap();
        let headers = lines.map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        });
        (status, headers.collect())
    }

    /// The next piece of the body; `None`: its end, as it should be.
    async fn piece(&mut self, headers: &HashMap<String, String>) -> Option<Vec<u8>> {
        if self.ended {
            return None;
        }
        if headers.contains_key("transfer-encoding") {
            let size = String::from_utf8(self.until(b"\r\n").await).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap();
            while self.bytes.len() < size + 2 {
                assert!(self.more().await, "cut off");
            }
            let rest = self.bytes.split_off(size + 2);
            let mut piece = std::mem::replace(&mut self.bytes, rest);
            piece.truncate(size);
            self.ended = size == 0;
            return (size > 0).then_some(piece);
        }
        self.ended = true;
        let length: usize = headers
            .get("content-length")
            .map_or(0, |length| length.parse().unwrap());
        while self.bytes.len() < length {
            assert!(self.more().await, "cut off");
        }
        Some(std::mem::take(&mut self.bytes))
    }
}

/// A browser's EventSource, without its reconnecting.
pub(crate) struct EventSource {
    reading: Reading,
    pub(crate) headers: HashMap<String, String>,
    buffer: String,
    pub(crate) last_id: String,
}

#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) event: String,
    pub(crate) data: Value,
    pub(crate) id: String,
}

impl EventSource {
    /// What must be a stream.
    pub(crate) async fn open(address: SocketAddr, path: &str, headers: &[&str]) -> Self {
        let mut reading = Reading::open(address, "GET", path, headers, "").await;
        let (status, headers) = reading.head().await;
        if status != 200 {
            let body = reading.piece(&headers).await.unwrap_or_default();
            panic!("{status}: {}", String::from_utf8_lossy(&body));
        }
        assert!(headers["content-type"].starts_with("text/event-stream"));
        Self {
            reading,
            headers,
            buffer: String::new(),
            last_id: String::new(),
        }
    }

    /// `None`: the server ended the stream, cleanly.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let block: String = self.buffer.drain(..end + 2).collect();
                if let Some(message) = self.dispatch(&block) {
                    return Some(message);
                }
                continue;
            }
            let piece = self.reading.piece(&self.headers).await?;
            self.buffer += &String::from_utf8(piece).unwrap();
        }
    }

    /// (HTML, "9.2.6 Interpreting an event stream")
    fn dispatch(&mut self, block: &str) -> Option<Message> {
        let (mut event, mut data) = ("message".to_owned(), String::new());
        for line in block.lines().filter(|line| !line.is_empty()) {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => self.last_id = value.to_owned(),
                "event" => event = value.to_owned(),
                "data" => {
                    data += value;
                    data.push('\n');
                }
                "" | "retry" => {}
                other => panic!("unknown field {other}"),
            }
        }
        let data = data.strip_suffix('\n')?;
        Some(Message {
            event,
            data: serde_json::from_str(data).unwrap(),
            id: self.last_id.clone(),
        })
    }
}
