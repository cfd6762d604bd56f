//! Words of the WebSocket: Phoenix' messages in the serialisations 1.0.0 (objects) and 2.0.0 (arrays, binary broadcasts). Pure:
//! no I/O, no clock. Called by `realtime`.

use axum::extract::ws::{Message, Utf8Bytes};
use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::events::{Event, Form};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// Kinds of binary messages.
const USER_PUSH: u8 = 3;
const BROADCAST: u8 = 4;
const JSON_ENCODED: u8 = 1;

/// What a client said.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) join_ref: Option<String>,
    pub(super) reference: Option<String>,
    pub(super) topic: String,
    pub(super) event: String,
    pub(super) payload: Value,
}

#[derive(Deserialize)]
struct SaidV1 {
    topic: String,
    event: String,
    #[serde(default)]
    payload: Value,
    #[serde(default, rename = "ref")]
    reference: Value,
    #[serde(default)]
    join_ref: Value,
}

impl Version {
    /// Of the `vsn` in the URL.
    pub(super) fn parse(vsn: Option<&str>) -> Option<Self> {
        match vsn {
            None | Some("" | "1.0.0") => Some(Self::V1),
            Some("2.0.0") => Some(Self::V2),
            Some(_) => None,
        }
    }

    /// `None`: nothing that means anything.
    pub(super) fn read(self, text: &str) -> Option<Said> {
        let (join_ref, reference, topic, event, payload) = match self {
            Self::V1 => {
                let said: SaidV1 = serde_json::from_str(text).ok()?;
                (
                    said.join_ref,
                    said.reference,
                    said.topic,
                    said.event,
                    said.payload,
                )
            }
            Self::V2 => serde_json::from_str::<(Value, Value, String, String, Value)>(text).ok()?,
        };
        Some(Said {
            join_ref: word(join_ref),
            reference: word(reference),
            topic,
            event,
            payload,
        })
    }

    pub(super) fn write(
        self,
        join_ref: Option<&str>,
        reference: Option<&str>,
        topic: &str,
        event: &str,
        payload: &Value,
    ) -> Message {
        let text = match self {
            Self::V1 => json!({
                "topic": topic, "event": event, "payload": payload, "ref": reference, "join_ref": join_ref,
            }),
            Self::V2 => json!([join_ref, reference, topic, event, payload]),
        };
        Message::Text(text.to_string().into())
    }

    /// An event, made once for all sockets that speak this version.
    pub(super) fn broadcast(self, event: &Event) -> Message {
        let form = match self {
            Self::V1 => Form::SocketV1,
            Self::V2 => Form::SocketV2,
        };
        let bytes = event.encoded(form, |event| {
            let replayed = event.reading.is_none();
            self.encode(
                &event.topic,
                &event.name,
                &event.message_id,
                replayed,
                &event.payload,
            )
        });
        message(self, bytes)
    }

    /// One that was made up from what a run is now.
    pub(super) fn made_up(self, topic: &str, name: &str, payload: &str) -> Message {
        message(self, self.encode(topic, name, "", true, payload))
    }

    fn encode(self, topic: &str, name: &str, id: &str, replayed: bool, payload: &str) -> Bytes {
        let topic = format!("realtime:{topic}");
        let mut meta = json!({ "id": id });
        if replayed {
            meta["replayed"] = true.into();
        }
        let meta = meta.to_string();
        let lengths = [topic.len(), name.len(), meta.len()].map(u8::try_from);
        if let (Self::V2, [Ok(topic_len), Ok(name_len), Ok(meta_len)]) = (self, lengths) {
            let mut bytes =
                BytesMut::with_capacity(5 + topic.len() + name.len() + meta.len() + payload.len());
            bytes.put_slice(&[BROADCAST, topic_len, name_len, meta_len, JSON_ENCODED]);
            bytes.put_slice(topic.as_bytes());
            bytes.put_slice(name.as_bytes());
            bytes.put_slice(meta.as_bytes());
            bytes.put_slice(payload.as_bytes());
            return bytes.freeze();
        }
        let (topic, name) = (json!(topic), json!(name));
        let body = format!(
            "{{\"type\":\"broadcast\",\"event\":{name},\"payload\":{payload},\"meta\":{meta}}}"
        );
        match self {
            Self::V1 => format!(
                "{{\"topic\":{topic},\"event\":\"broadcast\",\"payload\":{body},\"ref\":null}}"
            ),
            Self::V2 => format!("[null,null,{topic},\"broadcast\",{body}]"),
        }
        .into()
    }
}

/// Text begins with a bracket, a binary message with its kind.
fn message(version: Version, bytes: Bytes) -> Message {
    if version == Version::V2 && bytes.first() == Some(&BROADCAST) {
        return Message::Binary(bytes);
    }
    match Utf8Bytes::try_from(bytes) {
        Ok(text) => Message::Text(text),
        Err(_) => Message::Ping(Bytes::new()),
    }
}

fn word(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Of a client's binary broadcast: join_ref, ref and topic, in case it wants an answer.
pub(super) fn read_push(bytes: &[u8]) -> Option<(Option<String>, Option<String>, String)> {
    let [
        USER_PUSH,
        join_len,
        ref_len,
        topic_len,
        _event,
        _meta,
        _encoding,
        rest @ ..,
    ] = bytes
    else {
        return None;
    };
    let (join_ref, rest) = rest.split_at_checked(usize::from(*join_len))?;
    let (reference, rest) = rest.split_at_checked(usize::from(*ref_len))?;
    let (topic, _rest) = rest.split_at_checked(usize::from(*topic_len))?;
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    let or_none = |text: String| (!text.is_empty()).then_some(text);
    Some((
        or_none(text(join_ref)?),
        or_none(text(reference)?),
        text(topic)?,
    ))
}

/// What a made-up event of the run's state is: its name and payload.
pub(super) fn made_up_events(json: &str) -> Vec<(String, Box<RawValue>)> {
    serde_json::from_str(json).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(message: Message) -> String {
        match message {
            Message::Text(text) => text.to_string(),
            Message::Binary(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn both_versions_are_read_alike() {
        let v1 = r#"{"topic":"realtime:t","event":"phx_join","payload":{"a":1},"ref":"2","join_ref":"1"}"#;
        let v2 = r#"["1","2","realtime:t","phx_join",{"a":1}]"#;
        for (version, text) in [(Version::V1, v1), (Version::V2, v2)] {
            let said = version.read(text).unwrap();
            assert_eq!(
                (said.join_ref.as_deref(), said.reference.as_deref()),
                (Some("1"), Some("2"))
            );
            assert_eq!(
                (said.topic.as_str(), said.event.as_str(), &said.payload),
                ("realtime:t", "phx_join", &json!({"a": 1}))
            );
            for bad in [
                "",
                "[]",
                "{}",
                "null",
                "[1,2,3,4,5]",
                "{\"topic\":1}",
                "\"x\"",
            ] {
                assert!(version.read(bad).is_none(), "{bad}");
            }
        }
        let bare = Version::V1.read(r#"{"topic":"phoenix","event":"heartbeat"}"#);
        assert!(bare.unwrap().reference.is_none());
    }

    #[test]
    fn a_broadcast_is_binary_in_2_and_text_where_it_does_not_fit() {
        let short = Version::V2.encode("t", "run:started", "i", false, "{\"n\": 1.0}");
        assert_eq!(
            &short[..],
            b"\x04\x0a\x0b\x0a\x01realtime:trun:started{\"id\":\"i\"}{\"n\": 1.0}"
        );
        let long = format!("step:{}:started", "s".repeat(300));
        let long = text(message(
            Version::V2,
            Version::V2.encode("t", &long, "i", true, "{}"),
        ));
        let long: Value = serde_json::from_str(&long).unwrap();
        assert_eq!(long[4]["meta"], json!({"id": "i", "replayed": true}));
        let old = text(message(
            Version::V1,
            Version::V1.encode("t", "run:started", "i", false, "{}"),
        ));
        assert_eq!(
            old,
            r#"{"topic":"realtime:t","event":"broadcast","payload":{"type":"broadcast","event":"run:started","payload":{},"meta":{"id":"i"}},"ref":null}"#
        );
    }

    #[test]
    fn a_binary_push_says_whom_to_answer() {
        let push = b"\x03\x01\x02\x03\x01\x00\x0116abtopxe{}";
        let (join_ref, reference, topic) = read_push(push).unwrap();
        assert_eq!(
            (join_ref.as_deref(), reference.as_deref(), topic.as_str()),
            (Some("1"), Some("6a"), "bto")
        );
        for bad in [
            &b""[..],
            b"\x03",
            b"\x04\x01\x01\x01\x01\x00\x01abc",
            b"\x03\xff\x00\x00\x00\x00\x01x",
        ] {
            assert!(read_push(bad).is_none(), "{bad:?}");
        }
    }
}
