//! A client that sends the bytes it is told to and shows the bytes it gets: no driver's opinion in between. Its
//! `transcript` renders messages so that two sessions can be compared.

use std::fmt::Write;
use std::time::Duration;

use flowgate::config::ConnectUrl;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long one message may take to come.
const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PROTOCOL_3_0: u32 = 3 << 16;
pub(crate) const PROTOCOL_3_2: u32 = (3 << 16) | 2;
pub(crate) const SSL_REQUEST: u32 = 80_877_103;
pub(crate) const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;

pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    read: Vec<u8>,
    /// The body of BackendKeyData, once logged in: pid and secret.
    pub(crate) key: Vec<u8>,
    /// ParameterStatus as last told.
    pub(crate) parameters: std::collections::BTreeMap<String, String>,
    port: u16,
}

/// One backend message.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) tag: u8,
    pub(crate) body: Vec<u8>,
}

impl Raw {
    /// Connected, nothing sent.
    pub(crate) async fn connect(port: u16) -> Self {
        let stream = timeout(PATIENCE, TcpStream::connect(("127.0.0.1", port)))
            .await
            .unwrap()
            .unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            read: Vec::new(),
            key: Vec::new(),
            parameters: std::collections::BTreeMap::new(),
            port,
        }
    }

    /// Where trust is enough.
    pub(crate) async fn login(
        port: u16,
        user: &str,
        database: &str,
        more: &[(&str, &str)],
    ) -> Self {
        let mut raw = Self::connect(port).await;
        let mut parameters = vec![("user", user), ("database", database)];
        parameters.extend_from_slice(more);
        raw.send(&startup(PROTOCOL_3_0, &parameters)).await;
        let greeting = raw.until_ready().await;
        assert_eq!(
            greeting.last().map(|frame| frame.tag),
            Some(b'Z'),
            "{}",
            transcript(&greeting)
        );
        raw
    }

    /// Direct to the server a connection string names.
    pub(crate) async fn login_url(url: &str, more: &[(&str, &str)]) -> Self {
        let url: ConnectUrl = url.parse().unwrap();
        Self::login(url.port, &url.user, &url.database, more).await
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::from_be_bytes(self.key[..4].try_into().unwrap())
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.stream.write_all(bytes))
            .await
            .expect("the peer reads")
            .unwrap();
    }

    /// The peer may have hung up already.
    pub(crate) async fn try_send(&mut self, bytes: &[u8]) -> bool {
        timeout(PATIENCE, self.stream.write_all(bytes))
            .await
            .expect("the peer reads")
            .is_ok()
    }

    /// No more will come from this side; the other may still speak.
    pub(crate) async fn half_close(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn try_read(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.take_frame() {
                self.note(&frame);
                return Some(frame);
            }
            self.read.reserve(16 * 1024);
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.read))
                .await
                .expect("the peer says something");
            match read {
                Ok(0) | Err(_) => {
                    assert!(self.read.is_empty(), "the stream ends within a message");
                    return None;
                }
                Ok(_more) => {}
            }
        }
    }

    pub(crate) async fn read(&mut self) -> Frame {
        self.try_read()
            .await
            .expect("a message, not the end of the stream")
    }

    /// Everything up to and with ReadyForQuery, or up to the end of the stream.
    pub(crate) async fn until_ready(&mut self) -> Vec<Frame> {
        self.until(b'Z').await
    }

    /// Everything up to and with the first message of that kind, or up to the end of the stream.
    pub(crate) async fn until(&mut self, tag: u8) -> Vec<Frame> {
        let mut frames = Vec::new();
        while let Some(frame) = self.try_read().await {
            let last = frame.tag == tag;
            frames.push(frame);
            if last {
                break;
            }
        }
        frames
    }

    pub(crate) async fn until_end(&mut self) -> Vec<Frame> {
        self.until(0).await
    }

    /// Sends, and renders what comes up to ReadyForQuery.
    pub(crate) async fn ask(&mut self, bytes: &[u8]) -> String {
        transcript(&self.ask_frames(bytes).await)
    }

    /// The same, not rendered.
    pub(crate) async fn ask_frames(&mut self, bytes: &[u8]) -> Vec<Frame> {
        self.send(bytes).await;
        self.until_ready().await
    }

    /// A simple Query's answer, rendered.
    pub(crate) async fn query(&mut self, text: &str) -> String {
        self.ask(&query(text)).await
    }

    /// `count` bytes outside any message, such as the answer to SSLRequest.
    pub(crate) async fn bytes(&mut self, count: usize) -> Vec<u8> {
        while self.read.len() < count {
            self.read.reserve(1024);
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.read))
                .await
                .expect("the peer says something");
            match read {
                Ok(0) | Err(_) => break,
                Ok(_more) => {}
            }
        }
        let count = count.min(self.read.len());
        self.read.drain(..count).collect()
    }

    /// Whether nothing at all has come: what was read is empty and the socket has nothing ready.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let mut byte = [0; 1];
        self.read.is_empty()
            && matches!(self.stream.try_read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// A CancelRequest for this session, on a connection of its own; returns when the peer has closed that.
    pub(crate) async fn cancel(&self) {
        cancel(self.port, &self.key).await;
    }

    fn take_frame(&mut self) -> Option<Frame> {
        let len = self.read.get(1..5)?;
        let whole = 1 + usize::try_from(u32::from_be_bytes(len.try_into().unwrap())).unwrap();
        if self.read.len() < whole {
            return None;
        }
        let bytes: Vec<u8> = self.read.drain(..whole).collect();
        Some(Frame {
            tag: bytes[0],
            body: bytes[5..].to_vec(),
        })
    }

    fn note(&mut self, frame: &Frame) {
        match frame.tag {
            b'K' => self.key.clone_from(&frame.body),
            b'S' => {
                let [name, value] = frame.strings()[..] else {
                    panic!("{frame:?}")
                };
                self.parameters.insert(name.to_owned(), value.to_owned());
            }
            _ => {}
        }
    }
}

/// CancelRequest with `key` (pid and secret); returns when the peer has closed the connection.
pub(crate) async fn cancel(port: u16, key: &[u8]) {
    let mut raw = Raw::connect(port).await;
    let mut packet = Vec::new();
    packet.extend_from_slice(&u32::try_from(8 + key.len()).unwrap().to_be_bytes());
    packet.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
    packet.extend_from_slice(key);
    raw.send(&packet).await;
    assert!(
        raw.bytes(1).await.is_empty(),
        "a cancel request has no answer"
    );
}

// ---- what clients send ----

pub(crate) fn startup(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    for (name, value) in parameters {
        for text in [name, value] {
            put_text(&mut body, text);
        }
    }
    body.push(0);
    untagged(&body)
}

pub(crate) fn untagged(body: &[u8]) -> Vec<u8> {
    let mut packet = u32::try_from(body.len() + 4)
        .unwrap()
        .to_be_bytes()
        .to_vec();
    packet.extend_from_slice(body);
    packet
}

pub(crate) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![tag];
    packet.extend_from_slice(&untagged(body));
    packet
}

pub(crate) fn query(text: &str) -> Vec<u8> {
    message(b'Q', &[text.as_bytes(), &[0]].concat())
}

pub(crate) fn parse(name: &str, text: &str) -> Vec<u8> {
    parse_typed(name, text, &[])
}

pub(crate) fn parse_typed(name: &str, text: &str, types: &[u32]) -> Vec<u8> {
    let mut body = Vec::new();
    put_text(&mut body, name);
    put_text(&mut body, text);
    put_count(&mut body, types.len());
    types
        .iter()
        .for_each(|oid| body.extend_from_slice(&oid.to_be_bytes()));
    message(b'P', &body)
}

/// Parameters and results in text.
pub(crate) fn bind(portal: &str, statement: &str, parameters: &[Option<&[u8]>]) -> Vec<u8> {
    let mut body = Vec::new();
    put_text(&mut body, portal);
    put_text(&mut body, statement);
    put_count(&mut body, 0);
    put_count(&mut body, parameters.len());
    for parameter in parameters {
        match parameter {
            None => body.extend_from_slice(&(-1i32).to_be_bytes()),
            Some(bytes) => {
                body.extend_from_slice(&i32::try_from(bytes.len()).unwrap().to_be_bytes());
                body.extend_from_slice(bytes);
            }
        }
    }
    put_count(&mut body, 0);
    message(b'B', &body)
}

/// Bind of texts.
pub(crate) fn bind_text(portal: &str, statement: &str, parameters: &[&str]) -> Vec<u8> {
    let parameters: Vec<_> = parameters
        .iter()
        .map(|text| Some(text.as_bytes()))
        .collect();
    bind(portal, statement, &parameters)
}

pub(crate) fn describe_statement(name: &str) -> Vec<u8> {
    message(b'D', &[b"S", name.as_bytes(), &[0]].concat())
}

pub(crate) fn describe_portal(name: &str) -> Vec<u8> {
    message(b'D', &[b"P", name.as_bytes(), &[0]].concat())
}

pub(crate) fn close_statement(name: &str) -> Vec<u8> {
    message(b'C', &[b"S", name.as_bytes(), &[0]].concat())
}

pub(crate) fn close_portal(name: &str) -> Vec<u8> {
    message(b'C', &[b"P", name.as_bytes(), &[0]].concat())
}

/// `rows` 0: all.
pub(crate) fn execute(portal: &str, rows: u32) -> Vec<u8> {
    message(
        b'E',
        &[portal.as_bytes(), &[0], &rows.to_be_bytes()].concat(),
    )
}

pub(crate) fn sync() -> Vec<u8> {
    message(b'S', &[])
}

pub(crate) fn flush() -> Vec<u8> {
    message(b'H', &[])
}

pub(crate) fn terminate() -> Vec<u8> {
    message(b'X', &[])
}

pub(crate) fn copy_data(bytes: &[u8]) -> Vec<u8> {
    message(b'd', bytes)
}

pub(crate) fn copy_done() -> Vec<u8> {
    message(b'c', &[])
}

pub(crate) fn copy_fail(why: &str) -> Vec<u8> {
    message(b'f', &[why.as_bytes(), &[0]].concat())
}

/// Arguments and result in text.
pub(crate) fn function_call(oid: u32, arguments: &[&str]) -> Vec<u8> {
    let mut body = oid.to_be_bytes().to_vec();
    put_count(&mut body, 0);
    put_count(&mut body, arguments.len());
    for argument in arguments {
        body.extend_from_slice(&u32::try_from(argument.len()).unwrap().to_be_bytes());
        body.extend_from_slice(argument.as_bytes());
    }
    put_count(&mut body, 0);
    message(b'F', &body)
}

/// Parse, Bind, Describe, Execute and Sync of the unnamed statement, as most drivers send it.
pub(crate) fn extended(text: &str, parameters: &[&str]) -> Vec<u8> {
    [
        parse("", text),
        bind_text("", "", parameters),
        describe_portal(""),
        execute("", 0),
        sync(),
    ]
    .concat()
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    body.extend_from_slice(text.as_bytes());
    body.push(0);
}

fn put_count(body: &mut Vec<u8>, count: usize) {
    body.extend_from_slice(&u16::try_from(count).unwrap().to_be_bytes());
}

// ---- what servers say ----

/// One message a line; runs of equal kinds stay apart.
pub(crate) fn transcript(frames: &[Frame]) -> String {
    let lines: Vec<_> = frames.iter().map(Frame::render).collect();
    lines.join("\n")
}

/// The tags alone: `1 2 T D C Z`.
pub(crate) fn tags(frames: &[Frame]) -> String {
    frames.iter().map(|frame| char::from(frame.tag)).collect()
}

/// The first column of each row, as text.
pub(crate) fn first_columns(frames: &[Frame]) -> Vec<String> {
    let rows = frames.iter().filter(|frame| frame.tag == b'D');
    rows.map(|row| {
        row.columns()
            .swap_remove(0)
            .unwrap_or_else(|| "null".to_owned())
    })
    .collect()
}

/// The SQLSTATE of the first error.
pub(crate) fn error_code(frames: &[Frame]) -> Option<String> {
    frames
        .iter()
        .find(|frame| frame.tag == b'E')
        .and_then(|frame| frame.field(b'C'))
}

impl Frame {
    /// A field of an ErrorResponse or a NoticeResponse.
    pub(crate) fn field(&self, wanted: u8) -> Option<String> {
        let fields = self
            .body
            .split(|&byte| byte == 0)
            .filter(|field| !field.is_empty());
        let mut fields = fields.filter(|field| field[0] == wanted);
        fields
            .next()
            .map(|field| String::from_utf8_lossy(&field[1..]).into_owned())
    }

    /// The zero-terminated texts it consists of.
    pub(crate) fn strings(&self) -> Vec<&str> {
        let mut strings: Vec<_> = self
            .body
            .split(|&byte| byte == 0)
            .map(|text| std::str::from_utf8(text).unwrap())
            .collect();
        strings.pop();
        strings
    }

    /// The columns of a row as text.
    pub(crate) fn texts(&self) -> Vec<String> {
        let columns = self.columns().into_iter();
        columns
            .map(|column| column.unwrap_or_else(|| "null".to_owned()))
            .collect()
    }

    fn columns(&self) -> Vec<Option<String>> {
        let mut at = 2;
        let mut columns = Vec::new();
        while at < self.body.len() {
            let len = i32::from_be_bytes(self.body[at..at + 4].try_into().unwrap());
            at += 4;
            columns.push(usize::try_from(len).ok().map(|len| {
                let text = String::from_utf8_lossy(&self.body[at..at + len]).into_owned();
                at += len;
                text
            }));
        }
        columns
    }

    /// Names, type oids and formats.
    fn row_description(&self) -> String {
        let count = u16::from_be_bytes(self.body[..2].try_into().unwrap());
        let mut rest = &self.body[2..];
        let mut text = String::new();
        for _ in 0..count {
            let end = rest.iter().position(|&byte| byte == 0).unwrap();
            let name = String::from_utf8_lossy(&rest[..end]).into_owned();
            let fixed = &rest[end + 1..end + 19];
            let oid = u32::from_be_bytes(fixed[6..10].try_into().unwrap());
            let format = u16::from_be_bytes(fixed[16..18].try_into().unwrap());
            write!(text, " {name}:{oid}/{format}").unwrap();
            rest = &rest[end + 19..];
        }
        text
    }

    fn render(&self) -> String {
        let tag = char::from(self.tag);
        let rest = match self.tag {
            b'E' | b'N' => {
                let fields = [b'V', b'C', b'M', b'D', b'H', b'P']
                    .map(|name| self.field(name).unwrap_or_default());
                format!(" {}", fields.join("|").trim_end_matches('|'))
            }
            b'C' | b'S' => format!(" {}", self.strings().join("=")),
            b'Z' => format!(" {}", char::from(self.body[0])),
            b'D' => {
                let columns = self
                    .columns()
                    .into_iter()
                    .map(|column| column.unwrap_or_else(|| "∅".to_owned()));
                format!(" {}", columns.collect::<Vec<_>>().join("|"))
            }
            b'T' => self.row_description(),
            b'A' => format!(
                " {}",
                String::from_utf8_lossy(&self.body[4..])
                    .trim_end_matches('\0')
                    .replace('\0', "=")
            ),
            b'K' => String::new(),
            b'd' => format!(" {}", String::from_utf8_lossy(&self.body).trim_end()),
            _ => self
                .body
                .iter()
                .fold(String::new(), |text, byte| format!("{text} {byte:02x}")),
        };
        format!("{tag}{rest}")
    }
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.render())
    }
}
