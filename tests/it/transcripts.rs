//! The oracle is Postgres: every script of `tests/scripts` says the same direct and through us, message by message, though
//! it moves from server to server as it goes and others use them in between.

use std::path::PathBuf;

use crate::support::pg::{TestDb, fresh_database};
use crate::support::proxy::Proxy;
use crate::support::raw::{Raw, tags};
use crate::support::script::{self, Step};

/// Answers on which we may differ: where, what of Postgres's answer, what ours has instead, and why.
const JUSTIFIED: &[(&str, &str, &str, &str)] = &[];

#[tokio::test]
async fn simple_queries_answer_as_postgres_does() {
    compare("simple").await;
}

#[tokio::test]
async fn extended_queries_answer_as_postgres_does() {
    compare("extended").await;
}

#[tokio::test]
async fn copy_answers_as_postgres_does() {
    compare("copy").await;
}

#[tokio::test]
async fn a_session_keeps_what_postgres_keeps() {
    compare("session").await;
}

#[tokio::test]
async fn the_rest_answers_as_postgres_does() {
    compare("misc").await;
}

/// Free running on too few servers: whoever has to wait waits, and nobody gets another's answer.
#[tokio::test]
async fn clients_side_by_side_see_only_their_own_answers() {
    let (direct, through) = (fresh_database().await, fresh_database().await);
    let proxy = Proxy::with_pool(&through, 2).await;
    for name in ["simple", "extended", "copy"] {
        let run = async |letter: char, mut raw: Raw| {
            let mut transcript = Vec::new();
            for step in script::read(&text_of(name), letter) {
                let frames = script::run(&mut raw, &step).await;
                transcript.push((step.line, script::rendered(&frames, letter)));
            }
            transcript
        };
        let wanted = run('a', Raw::login_url(&direct.primary_url, &[]).await).await;
        let clients = "abcdef"
            .chars()
            .map(async |letter| run(letter, proxy.raw().await).await);
        for (client, heard) in futures_util::future::join_all(clients)
            .await
            .into_iter()
            .enumerate()
        {
            for (wanted, heard) in wanted.iter().zip(heard) {
                assert_eq!(
                    *wanted, heard,
                    "{name}.txt, client {client}, line {}",
                    wanted.0
                );
            }
        }
    }
    proxy.shut_down().await;
}

async fn compare(name: &str) {
    let (direct, through) = (fresh_database().await, fresh_database().await);
    let proxy = Proxy::with_pool(&through, 2).await;
    let mut crowd = Crowd::new(&proxy).await;
    let steps = script::read(&text_of(name), 'a');
    let mut alone = direct_session(&direct).await;
    let mut shared = proxy.raw().await;
    let mut different = Vec::new();
    for step in &steps {
        let wanted = script::run(&mut alone, step).await;
        // Inside a transaction, or a request, it has its server.
        crowd.jostle().await;
        let heard = script::run(&mut shared, step).await;
        crowd.settle().await;
        let [wanted, heard] = [wanted, heard].map(|frames| script::rendered(&frames, 'a'));
        if is_justified(name, step, &wanted, &heard) {
            continue;
        }
        if wanted != heard {
            different.push(format!(
                "{name}.txt:{}\n  Postgres:\n{wanted}\n  through us:\n{heard}\n",
                step.line
            ));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
    proxy.shut_down().await;
}

async fn direct_session(db: &TestDb) -> Raw {
    Raw::login_url(&db.primary_url, &[]).await
}

fn is_justified(name: &str, step: &Step, wanted: &str, heard: &str) -> bool {
    let sent = String::from_utf8_lossy(&step.bytes);
    JUSTIFIED.iter().any(|(place, theirs, ours, _why)| {
        let (script, text) = place.split_once(".txt: ").unwrap();
        script == name && sent.contains(text) && wanted.replace(theirs, ours) == heard
    })
}

fn text_of(name: &str) -> String {
    let path: PathBuf = [
        env!("CARGO_MANIFEST_DIR"),
        "tests",
        "scripts",
        &format!("{name}.txt"),
    ]
    .iter()
    .collect();
    std::fs::read_to_string(path).unwrap()
}

/// Two clients on a pool of two, of whom always one holds a server while the client under test runs a step: it never gets
/// the same one twice, unless it is entitled to.
struct Crowd {
    clients: [Raw; 2],
    turn: usize,
}

impl Crowd {
    async fn new(proxy: &Proxy) -> Self {
        let mut clients = [proxy.raw().await, proxy.raw().await];
        // Each gets a server to prefer.
        let [a, b] = &mut clients;
        a.query("begin").await;
        b.query("begin").await;
        a.query("commit").await;
        b.query("commit").await;
        Self { clients, turn: 0 }
    }

    async fn jostle(&mut self) {
        self.turn = 1 - self.turn;
        let client = &mut self.clients[self.turn];
        // Settings and an unnamed statement of its own to leave behind.
        client
            .query("set datestyle = 'SQL'; set my.own = 'crowd'")
            .await;
        client
            .send(&crate::support::raw::extended("select 'crowd'", &[]))
            .await;
        assert_eq!(tags(&client.until_ready().await), "12TDCZ");
        client.query("begin").await;
    }

    async fn settle(&mut self) {
        assert_eq!(
            self.clients[self.turn].query("rollback").await,
            "C ROLLBACK\nZ I"
        );
    }
}
