//! Money moves through the proxy while servers, the primary and clients die: none is made or lost, nothing acknowledged is
//! undone, nothing is done by half or twice, and nobody is left without a word.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::Client;

use flowgate::embedded::{Cluster, ClusterOptions};

use crate::support::chance::{Chance, Stretch, seed};
use crate::support::proxy::{PATIENCE, Proxy, text, try_text};
use crate::support::raw::{
    Frame, PROTOCOL_3_0, Raw, bind_text, copy_data, copy_done, copy_fail, error_code, execute,
    parse, query, startup, sync, tags, transcript,
};
use crate::support::wait::wait_until;

const CLIENTS: u64 = 12;
const SERVERS: usize = 4;
const ACCOUNTS: u64 = 10;
/// In normal runs.
const FAULTS: u64 = 14;
/// Between two faults, so that each finds the bank at work.
const TRANSFERS_BETWEEN: u64 = 40;

/// What a client may be told when its server, or the primary, dies under it (DESIGN §11).
const OF_FAULTS: &[&str] = &["57P01", "57P02", "57P03", "08006"];

/// `entry` has both legs of each transfer, without a key: one done twice would show. `transfer` is what drivers do in one
/// statement.
const BANK: &str = "
    create table account (id int primary key, balance bigint not null);
    insert into account select n, 1000 from generate_series(0, 9) n;
    create table entry (transfer bigint not null, account int not null, amount bigint not null);
    create function transfer(transfer bigint, source int, target int, amount bigint) returns void language plpgsql as $$
    begin
        update account set balance = balance - amount where id = source;
        update account set balance = balance + amount where id = target;
        insert into entry values (transfer, source, -amount), (transfer, target, amount);
    end $$";

/// `FLOWGATE_SEED` repeats what each client does and the kinds of faults; `FLOWGATE_SOAK_SECONDS` goes on for that long.
#[tokio::test]
async fn no_money_is_made_or_lost_whoever_dies() {
    let mut cluster = Cluster::start(ClusterOptions {
        replicas: 0,
        ..ClusterOptions::default()
    })
    .await
    .unwrap();
    let admin = cluster.connect_primary().await.unwrap();
    admin.batch_execute(BANK).await.unwrap();
    drop(admin);
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.pool.size = SERVERS.try_into().unwrap();
        config.pool.checkout_timeout = PATIENCE;
    })
    .await;
    let seed = seed();
    let bank = Bank {
        proxy: &proxy,
        closing: AtomicBool::new(false),
        next: AtomicU64::new(1),
        acknowledged: AtomicU64::new(0),
    };
    let clients = join_all((0..CLIENTS).map(async |me| {
        let mut teller = Teller {
            bank: &bank,
            chance: Chance::of(seed, me + 1),
            done: Vec::new(),
        };
        teller.work().await;
        teller.done
    }));
    let mut chance = Chance::of(seed, 0);
    let stretch = Stretch::of(FAULTS);
    let faults = async {
        let mut faults = 0;
        while stretch.has(faults) {
            bank.works_on().await;
            break_something(&mut cluster, &mut chance).await;
            faults += 1;
        }
        bank.works_on().await;
        bank.closing.store(true, Ordering::Relaxed);
        faults
    };
    let (done, faults) = futures_util::future::join(clients, faults).await;
    let done = done.concat();
    println!("{faults} faults, {}", summary(&done));

    let direct = cluster.connect_primary().await.unwrap();
    let busy = "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid() and application_name not like 'flowgate%' and state <> 'idle'";
    wait_until(
        "what vanished clients began is ended",
        PATIENCE,
        async || text(&direct, busy).await == "0",
    )
    .await;
    audit(&direct, &done).await;
    let client = proxy.connect().await;
    assert_eq!(text(&client, "select count(*) from account").await, "10");
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

/// What a client knows of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Its commit was acknowledged.
    Done,
    /// It was refused, or its commit never sent.
    Undone,
    /// The session ended between commit and answer.
    Unknown,
}

fn summary(done: &[(u64, Fate)]) -> String {
    let count = |fate| done.iter().filter(|(_, is)| *is == fate).count();
    let [yes, no, unknown] = [Fate::Done, Fate::Undone, Fate::Unknown].map(count);
    format!("{yes} transfers done, {no} not, {unknown} unknown")
}

/// Everything the tellers know against everything that is in the tables.
async fn audit(direct: &Client, done: &[(u64, Fate)]) {
    let wrong = "select count(*) from account a where balance <> 1000 + coalesce((select sum(amount) from entry e where e.account = a.id), 0)";
    assert_eq!(
        text(direct, "select sum(balance) from account").await,
        "10000"
    );
    assert_eq!(
        text(direct, "select coalesce(sum(amount), 0) from entry").await,
        "0"
    );
    assert_eq!(
        text(direct, wrong).await,
        "0",
        "accounts that differ from their entries"
    );
    let rows = direct
        .query(
            "select transfer, count(*) from entry group by transfer",
            &[],
        )
        .await
        .unwrap();
    let mut legs: std::collections::HashMap<u64, i64> = rows
        .iter()
        .map(|row| (row.get::<_, i64>(0) as u64, row.get(1)))
        .collect();
    for &(transfer, fate) in done {
        let legs = legs.remove(&transfer).unwrap_or(0);
        let possible: &[i64] = match fate {
            Fate::Done => &[2],
            Fate::Undone => &[0],
            Fate::Unknown => &[0, 2],
        };
        assert!(
            possible.contains(&legs),
            "transfer {transfer}, {fate:?}, has {legs} legs"
        );
    }
    assert!(legs.is_empty(), "transfers nobody asked for: {legs:?}");
    assert!(
        done.iter().any(|(_, fate)| *fate == Fate::Done)
            && done.iter().any(|(_, fate)| *fate != Fate::Done),
        "nothing was shown: {}",
        summary(done)
    );
}

async fn break_something(cluster: &mut Cluster, chance: &mut Chance) {
    let servers = "from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid() and application_name not like 'flowgate%'";
    match chance.below(8) {
        // A server, some servers, all of them: with a word from Postgres.
        kind @ 0..=3 => {
            let which = match kind {
                0 => "and state = 'active' order by random() limit 1",
                1 => "and state like 'idle in%' order by random() limit 1",
                2 => "order by random() limit 2",
                _ => "",
            };
            let direct = cluster.connect_primary().await.unwrap();
            try_text(
                &direct,
                &format!(
                    "select count(pg_terminate_backend(pid)) from (select pid {servers} {which}) s"
                ),
            )
            .await
            .unwrap();
        }
        // Without one: Postgres ends all others and recovers.
        4 | 5 => {
            let direct = cluster.connect_primary().await.unwrap();
            let born = text(
                &direct,
                "select pid from pg_stat_activity where backend_type = 'checkpointer'",
            )
            .await;
            let pid = text(
                &direct,
                &format!("select pid {servers} order by random() limit 1"),
            )
            .await;
            let Ok(pid) = pid.parse() else { return };
            let pid = Pid::from_raw(pid).unwrap();
            // It may have gone by itself.
            if kill_process(pid, Signal::KILL).is_err() {
                return;
            }
            wait_until("Postgres has recovered", PATIENCE, async || {
                let Ok(direct) = cluster.connect_primary().await else {
                    return false;
                };
                let now = "select pid from pg_stat_activity where backend_type = 'checkpointer'";
                try_text(&direct, now)
                    .await
                    .is_ok_and(|pid| !pid.is_empty() && pid != born)
            })
            .await;
        }
        6 => cluster.restart_primary().await.unwrap(),
        _ => {
            cluster.kill_primary().await.unwrap();
            cluster.start_primary().await.unwrap();
        }
    }
}

struct Bank<'a> {
    proxy: &'a Proxy,
    closing: AtomicBool,
    next: AtomicU64,
    acknowledged: AtomicU64,
}

impl Bank<'_> {
    /// Returns when some more transfers were acknowledged.
    async fn works_on(&self) {
        let enough = self.acknowledged.load(Ordering::Relaxed) + TRANSFERS_BETWEEN;
        wait_until("the bank works", PATIENCE, async || {
            self.acknowledged.load(Ordering::Relaxed) >= enough
        })
        .await;
    }
}

struct Teller<'a> {
    bank: &'a Bank<'a>,
    chance: Chance,
    done: Vec<(u64, Fate)>,
}

/// How one transfer is put.
struct Order {
    transfer: u64,
    source: u64,
    target: u64,
    amount: u64,
}

impl Order {
    /// The lower account first: tellers wait for each other, never in a circle.
    fn updates(&self) -> [String; 2] {
        let Self {
            source,
            target,
            amount,
            ..
        } = self;
        let take = format!("update account set balance = balance - {amount} where id = {source}");
        let give = format!("update account set balance = balance + {amount} where id = {target}");
        [take, give]
    }

    fn entries(&self) -> String {
        let Self {
            transfer,
            source,
            target,
            amount,
        } = self;
        format!(
            "insert into entry values ({transfer}, {source}, -{amount}), ({transfer}, {target}, {amount})"
        )
    }
}

/// The rest of a session, after something was sent in it.
enum Answer {
    /// ReadyForQuery came, without an error before it.
    Fine,
    /// An error, and the session goes on.
    Refused,
    /// The session is over, with a word why.
    Over,
}

impl Teller<'_> {
    async fn work(&mut self) {
        while !self.bank.closing.load(Ordering::Relaxed) {
            let Some(mut raw) = self.log_in().await else {
                continue;
            };
            while !self.bank.closing.load(Ordering::Relaxed) {
                let transfer = self.bank.next.fetch_add(1, Ordering::Relaxed);
                let source = self.chance.below(ACCOUNTS - 1);
                let order = Order {
                    transfer,
                    source,
                    target: source + 1 + self.chance.below(ACCOUNTS - 1 - source),
                    amount: self.chance.below(50),
                };
                let (fate, goes_on) = self.transfer(&mut raw, &order).await;
                if fate == Fate::Done {
                    self.bank.acknowledged.fetch_add(1, Ordering::Relaxed);
                }
                self.done.push((transfer, fate));
                if !goes_on {
                    break;
                }
            }
        }
    }

    /// `None`: refused, in words.
    async fn log_in(&self) -> Option<Raw> {
        let Proxy {
            port,
            user,
            database,
            ..
        } = self.bank.proxy;
        let mut raw = Raw::connect(*port).await;
        let parameters = [("user", user.as_str()), ("database", database.as_str())];
        raw.send(&startup(PROTOCOL_3_0, &parameters)).await;
        let frames = raw.until_ready().await;
        if tags(&frames).ends_with('Z') {
            return Some(raw);
        }
        let code = error_code(&frames).unwrap_or_default();
        assert!(
            OF_FAULTS.contains(&code.as_str()),
            "a login heard: {}",
            transcript(&frames)
        );
        None
    }

    /// What became of it, and whether the session goes on.
    async fn transfer(&mut self, raw: &mut Raw, order: &Order) -> (Fate, bool) {
        match self.chance.below(6) {
            0 | 1 => self.step_by_step(raw, order).await,
            2 => {
                let [take, give] = order.updates();
                let entries = order.entries();
                self.at_once(
                    raw,
                    &query(&format!("begin; {take}; {give}; {entries}; commit")),
                )
                .await
            }
            // One implicit transaction, by a string and by a pipeline.
            3 => {
                let [take, give] = order.updates();
                let entries = order.entries();
                let bytes = if self.chance.one_in(2) {
                    query(&format!("{take}; {entries}; {give}"))
                } else {
                    let mut bytes = Vec::new();
                    for text in [take, give, entries] {
                        bytes.extend_from_slice(&parse("", &text));
                        bytes.extend_from_slice(&bind_text("", "", &[]));
                        bytes.extend_from_slice(&execute("", 0));
                    }
                    bytes.extend_from_slice(&sync());
                    bytes
                };
                self.at_once(raw, &bytes).await
            }
            4 => {
                let Order {
                    transfer,
                    source,
                    target,
                    amount,
                } = order;
                let parameters = [transfer, source, target, amount].map(u64::to_string);
                let parameters: Vec<_> = parameters.iter().map(String::as_str).collect();
                let bytes = [
                    parse("", "select transfer($1, $2, $3, $4)"),
                    bind_text("", "", &parameters),
                    execute("", 0),
                    sync(),
                ];
                self.at_once(raw, &bytes.concat()).await
            }
            _ => self.by_copy(raw, order).await,
        }
    }

    /// A single request is the whole transaction.
    async fn at_once(&mut self, raw: &mut Raw, bytes: &[u8]) -> (Fate, bool) {
        if !raw.try_send(bytes).await {
            // What was said before it hung up is for the next to read; some of this may have arrived.
            return (Fate::Unknown, false);
        }
        if self.chance.one_in(40) {
            return (Fate::Unknown, false);
        }
        match answer(raw).await {
            Answer::Fine => (Fate::Done, true),
            Answer::Refused => {
                // The string's own BEGIN may have been left open by the error.
                let rolled_back = answer_to(raw, "rollback").await;
                (Fate::Undone, !matches!(rolled_back, Answer::Over))
            }
            Answer::Over => (Fate::Unknown, false),
        }
    }

    async fn step_by_step(&mut self, raw: &mut Raw, order: &Order) -> (Fate, bool) {
        let [take, give] = order.updates();
        for sql in ["begin".to_owned(), take, give, order.entries()] {
            if let Some(end) = self.step(raw, &query(&sql)).await {
                return end;
            }
        }
        if self.chance.one_in(20) {
            let rolled_back = answer_to(raw, "rollback").await;
            return (Fate::Undone, !matches!(rolled_back, Answer::Over));
        }
        self.at_once(raw, &query("commit")).await
    }

    /// The entries come by COPY, which may be called off, or break off, in the middle.
    async fn by_copy(&mut self, raw: &mut Raw, order: &Order) -> (Fate, bool) {
        let [take, give] = order.updates();
        for sql in ["begin".to_owned(), take, give] {
            if let Some(end) = self.step(raw, &query(&sql)).await {
                return end;
            }
        }
        if !raw.try_send(&query("copy entry from stdin")).await {
            return (Fate::Undone, false);
        }
        let frames = raw.until(b'G').await;
        if !tags(&frames).ends_with('G') {
            over(&frames);
            return (Fate::Undone, false);
        }
        let Order {
            transfer,
            source,
            target,
            amount,
        } = order;
        raw.try_send(&copy_data(
            format!("{transfer}\t{source}\t-{amount}\n").as_bytes(),
        ))
        .await;
        match self.chance.below(12) {
            0 => return (Fate::Undone, false),
            1 => {
                raw.try_send(&copy_fail("called off")).await;
                return match answer(raw).await {
                    Answer::Fine => panic!("a COPY called off went through"),
                    Answer::Refused => {
                        let rolled_back = answer_to(raw, "rollback").await;
                        (Fate::Undone, !matches!(rolled_back, Answer::Over))
                    }
                    Answer::Over => (Fate::Undone, false),
                };
            }
            _ => {}
        }
        let rest = [
            copy_data(format!("{transfer}\t{target}\t{amount}\n").as_bytes()),
            copy_done(),
        ];
        if let Some(end) = self.step(raw, &rest.concat()).await {
            return end;
        }
        self.at_once(raw, &query("commit")).await
    }

    /// A request before the commit; `Some`: the transfer ends here.
    async fn step(&mut self, raw: &mut Raw, bytes: &[u8]) -> Option<(Fate, bool)> {
        raw.try_send(bytes).await;
        if self.chance.one_in(150) {
            return Some((Fate::Undone, false));
        }
        match answer(raw).await {
            Answer::Fine => None,
            Answer::Refused => {
                let rolled_back = answer_to(raw, "rollback").await;
                Some((Fate::Undone, !matches!(rolled_back, Answer::Over)))
            }
            Answer::Over => Some((Fate::Undone, false)),
        }
    }
}

async fn answer_to(raw: &mut Raw, sql: &str) -> Answer {
    raw.try_send(&query(sql)).await;
    answer(raw).await
}

async fn answer(raw: &mut Raw) -> Answer {
    let frames = raw.until_ready().await;
    if !tags(&frames).ends_with('Z') {
        over(&frames);
        return Answer::Over;
    }
    match error_code(&frames) {
        None => Answer::Fine,
        Some(code) => {
            // 57014: a COPY called off.
            assert!(
                OF_FAULTS.contains(&code.as_str()) || code == "57014",
                "{}",
                transcript(&frames)
            );
            Answer::Refused
        }
    }
}

/// A session that ends says why.
fn over(frames: &[Frame]) {
    let code = error_code(frames).unwrap_or_default();
    assert!(
        OF_FAULTS.contains(&code.as_str()),
        "a session ended with: {:?}",
        transcript(frames)
    );
}
