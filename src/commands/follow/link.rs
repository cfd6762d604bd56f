//! The connection that listens: dials, subscribes one channel after another, and hands over notifications, both at the same
//! time. Knows nothing of what they say. Called by `mod`.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_postgres::{AsyncMessage, Client, Error};

use crate::config::ConnectUrl;
use crate::server::control::{DialError, dial};
use crate::wire::quote;

pub(super) const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Beyond them the socket is not read, and the proxy's own bounds count.
const ROOM: usize = 256;

pub(super) struct Note {
    pub(super) channel: String,
    pub(super) payload: String,
}

pub(super) enum Heard {
    Note(Note),
    /// Every channel asked for until now is in force.
    InForce,
    Lost(Option<Error>),
    Refused(Error),
}

pub(super) struct Ears {
    client: Arc<Client>,
    notes: mpsc::Receiver<Result<Note, Error>>,
    wanted: VecDeque<String>,
    asking: Option<Asking>,
    _driver: JoinSet<()>,
}

type Asking = Pin<Box<dyn Future<Output = Result<(), Error>>>>;

impl Ears {
    pub(super) async fn open(url: &ConnectUrl) -> Result<Self, DialError> {
        let (client, mut connection) = dial(url, "flowgate follow", CONNECT_MAX).await?;
        let (tell, notes) = mpsc::channel(ROOM);
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
                let note = match message {
                    Ok(AsyncMessage::Notification(note)) => Ok(Note {
                        channel: note.channel().to_owned(),
                        payload: note.payload().to_owned(),
                    }),
                    Ok(_notice) => continue,
                    Err(error) => Err(error),
                };
                if tell.send(note).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            client: Arc::new(client),
            notes,
            wanted: VecDeque::new(),
            asking: None,
            _driver: driver,
        })
    }

    pub(super) fn listen(&mut self, channel: &str) {
        self.wanted
            .push_back(format!("listen {}", quote::ident(channel)));
    }

    pub(super) fn unlisten(&mut self, channel: &str) {
        self.wanted
            .push_back(format!("unlisten {}", quote::ident(channel)));
    }

    /// Cancel-safe: what is under way goes on with the next call.
    pub(super) async fn hear(&mut self) -> Heard {
        loop {
            if self.asking.is_none()
                && let Some(sql) = self.wanted.pop_front()
            {
                let client = Arc::clone(&self.client);
                self.asking = Some(Box::pin(async move { client.batch_execute(&sql).await }));
            }
            let answered = poll_fn(|cx| match &mut self.asking {
                Some(asking) => asking.as_mut().poll(cx),
                None => std::task::Poll::Pending,
            });
            tokio::select! {
                biased;
                answer = answered => {
                    self.asking = None;
                    match answer {
                        Ok(()) if self.wanted.is_empty() => return Heard::InForce,
                        Ok(()) => {}
                        Err(error) if is_final(&error) => return Heard::Refused(error),
                        Err(error) => return Heard::Lost(Some(error)),
                    }
                }
                note = self.notes.recv() => return match note {
                    Some(Ok(note)) => Heard::Note(note),
                    Some(Err(error)) => Heard::Lost(Some(error)),
                    None => Heard::Lost(None),
                },
            }
        }
    }
}

/// Postgres says no, and will again. What comes of a server going, coming, full or promoted passes.
pub(super) fn is_final(error: &Error) -> bool {
    error.code().is_some_and(|code| {
        !matches!(
            code.code().get(..2),
            Some("08" | "25" | "40" | "53" | "57" | "58")
        )
    })
}
