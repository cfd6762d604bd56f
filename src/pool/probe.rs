//! Which replicas are fresh enough: samples the primary's WAL position and the replicas' replay positions, as an ordinary
//! client, and answers "may this read go to a replica". Never routes and never opens a server for a client; `app` starts
//! it, `client/session` asks.
//!
//! **Token.** A commit acknowledged before a sample's query *started* lies below that sample's insert position, whatever
//! the commit's `synchronous_commit` was. So the first sample started at or after `since` stands for everything
//! acknowledged before `since`, and nothing need be asked for each write.
//!
//! Sampling follows demand: the primary is asked when somebody's `since` is newer than the last sample, a replica while
//! somebody waits for it; otherwise both once a second, for their health.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use tracing::{debug, info, warn};

use crate::server::control::{DialError, dial, words};
use crate::upstream::Upstream;

const APPLICATION: &str = "flowgate probe";
/// Samples kept. Equal positions are one sample, so an idle primary fills one.
const SAMPLES: usize = 2048;
/// Between two samples of a replica.
const SPACING: Duration = Duration::from_millis(2);
/// Without demand.
const HEALTH: Duration = Duration::from_secs(1);
/// A replica goes on being polled so long after somebody looked for it and found it behind.
const INTEREST: Duration = Duration::from_millis(100);
/// A session stays with the replica it knows until that has twice as many reads under way as the least busy, and so many more:
/// another has to be shown to be no older first.
const AFFINITY: u32 = 4;
const ANSWER_WAIT: Duration = Duration::from_secs(3);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// A handle; the samplers end with the last one.
#[derive(Clone)]
pub(crate) struct Freshness {
    shared: Arc<Shared>,
    /// Dropped with the last handle, which aborts the samplers: they hold `shared` alone.
    _tasks: Arc<JoinSet<()>>,
}

struct Shared {
    primary: Arc<Upstream>,
    replicas: Vec<Arc<Upstream>>,
    connect_timeout: Duration,
    /// `route.sample_ms`: between two samples of the primary.
    spacing: Duration,
    window: Mutex<Window>,
    /// The window has news for whoever waits.
    news: Notify,
    sample_primary: Notify,
    sample_replica: Vec<Notify>,
}

impl Freshness {
    pub(crate) fn start(
        primary: Arc<Upstream>,
        replicas: Vec<Arc<Upstream>>,
        connect_timeout: Duration,
        spacing: Duration,
        handle: &Handle,
    ) -> Self {
        let shared = Arc::new(Shared {
            window: Mutex::new(Window::new(replicas.len())),
            sample_replica: replicas.iter().map(|_| Notify::new()).collect(),
            primary,
            replicas,
            connect_timeout,
            spacing,
            news: Notify::new(),
            sample_primary: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn_on(run(Arc::clone(&shared), Server::Primary), handle);
        for replica in 0..shared.replicas.len() {
            tasks.spawn_on(run(Arc::clone(&shared), Server::Replica(replica)), handle);
        }
        Self {
            shared,
            _tasks: Arc::new(tasks),
        }
    }

    /// A replica that has replayed whatever any commit acknowledged before `since` can have written. Waits at most
    /// `wait`, and not at all where that is hopeless. `None`: use the primary.
    pub(crate) async fn fresh_replica(
        &self,
        since: Instant,
        prefer: Option<usize>,
        wait: Duration,
    ) -> Option<usize> {
        let deadline = Instant::now() + wait;
        loop {
            // Enabled before looking, so that news in between is not missed.
            let mut news = pin!(self.shared.news.notified());
            news.as_mut().enable();
            match self.shared.ask(since, prefer, deadline) {
                Verdict::Fresh(replica) => return Some(replica),
                Verdict::Primary => return None,
                Verdict::Wait => {}
            }
            if timeout_at(deadline, news).await.is_err() {
                return None;
            }
        }
    }

    /// Whether what was seen of a replica holds for a connection to it that has been open since `opened`. One that crashed
    /// begins again behind what it had shown before, so only what was sampled after the connection was there is said of
    /// the same life. Waits for such a sample, `wait` at most.
    pub(crate) async fn still_fresh(
        &self,
        replica: usize,
        since: Instant,
        opened: Instant,
        wait: Duration,
    ) -> bool {
        let deadline = Instant::now() + wait;
        loop {
            let mut news = pin!(self.shared.news.notified());
            news.as_mut().enable();
            match self.shared.window().vouches(replica, since, opened) {
                Verdict::Fresh(_) => return true,
                Verdict::Primary => return false,
                Verdict::Wait => {}
            }
            let Some(sampler) = self.shared.sample_replica.get(replica) else {
                return false;
            };
            sampler.notify_one();
            if timeout_at(deadline, news).await.is_err() {
                return false;
            }
        }
    }
}

impl Shared {
    fn window(&self) -> MutexGuard<'_, Window> {
        // INVARIANT: nothing inside panics half-way.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, since: Instant, prefer: Option<usize>, deadline: Instant) -> Verdict {
        let now = Instant::now();
        let mut window = self.window();
        let load = |replica: usize| self.replicas[replica].reading();
        let verdict = window.decide(since, prefer, load, now, deadline);
        let (primary, replicas) = (window.wants_primary(), window.wants_replicas(now));
        drop(window);
        if verdict == Verdict::Wait {
            if primary {
                self.sample_primary.notify_one();
            }
            if replicas {
                self.sample_replica.iter().for_each(Notify::notify_one);
            }
        }
        verdict
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Fresh(usize),
    /// Not yet, perhaps within the deadline.
    Wait,
    /// Not in time.
    Primary,
}

/// All that was sampled. Pure: time is passed in.
#[derive(Debug)]
struct Window {
    /// Oldest first; positions strictly rise.
    samples: VecDeque<Sample>,
    /// As last seen.
    primary: Option<Identity>,
    away: bool,
    replicas: Vec<Replica>,
    /// The newest `since` that no sample covers yet.
    wanted_since: Option<Instant>,
    /// The position somebody lately looked for in vain.
    wanted_lsn: u64,
    wanted_until: Option<Instant>,
    rotation: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    lsn: u64,
    /// The start of the first and the last query that saw it.
    first: Instant,
    last: Instant,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Replica {
    in_rotation: bool,
    replayed: u64,
    /// When the query that saw that was sent, and the first one over the same connection; `None`: never.
    asked: Option<Instant>,
    born: Option<Instant>,
}

impl Replica {
    /// After a crash a replica begins again behind what it had shown. Whatever that was, the primary had it by then.
    fn since(&self, since: Instant) -> Instant {
        self.born.map_or(since, |born| born.max(since))
    }
}

/// Whose WAL positions these are. Parts that the control role may not see are empty and match anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Identity {
    system: String,
    timeline: String,
}

impl Identity {
    fn agrees_with(&self, other: &Self) -> bool {
        let same = |a: &str, b: &str| a.is_empty() || b.is_empty() || a == b;
        same(&self.system, &other.system) && same(&self.timeline, &other.timeline)
    }
}

impl Window {
    fn new(replicas: usize) -> Self {
        Self {
            samples: VecDeque::new(),
            primary: None,
            away: true,
            replicas: vec![Replica::default(); replicas],
            wanted_since: None,
            wanted_lsn: 0,
            wanted_until: None,
            rotation: 0,
        }
    }

    /// The lowest position known to cover everything acknowledged before `since`.
    fn covering(&self, since: Instant) -> Option<Sample> {
        self.samples
            .get(self.samples.partition_point(|sample| sample.last < since))
            .copied()
    }

    fn has_replayed(&self, replica: &Replica, since: Instant) -> bool {
        let need = self.covering(replica.since(since));
        replica.in_rotation && need.is_some_and(|need| replica.replayed >= need.lsn)
    }

    fn decide(
        &mut self,
        since: Instant,
        prefer: Option<usize>,
        load: impl Fn(usize) -> u32,
        now: Instant,
        deadline: Instant,
    ) -> Verdict {
        if !self.replicas.iter().any(|replica| replica.in_rotation) {
            return Verdict::Primary;
        }
        let Some(need) = self.covering(since) else {
            if self.away {
                return Verdict::Primary;
            }
            self.wanted_since = self.wanted_since.max(Some(since));
            return Verdict::Wait;
        };
        let is_fresh = |replica: &Replica| self.has_replayed(replica, since);
        // The least busy; among equals each in its turn.
        let count = self.replicas.len();
        let least = (0..count)
            .map(|step| (self.rotation + step) % count)
            .filter(|&index| is_fresh(&self.replicas[index]))
            .min_by_key(|&index| load(index));
        if let Some(least) = least {
            let stays = |&preferred: &usize| {
                let fresh = self.replicas.get(preferred).is_some_and(is_fresh);
                fresh && load(preferred) <= load(least).saturating_mul(2) + AFFINITY
            };
            if let Some(preferred) = prefer.filter(stays) {
                return Verdict::Fresh(preferred);
            }
            self.rotation = (least + 1) % count;
            return Verdict::Fresh(least);
        }
        // Polled on even when hopeless now: it may catch up.
        self.wanted_lsn = self.wanted_lsn.max(need.lsn);
        self.wanted_until = Some(now + INTEREST);
        // What the primary wrote at `need.first` arrives as late as the replica is behind.
        let in_time = |replica: &Replica| {
            let known = self.covering(replica.since(since)).is_some() || !self.away;
            replica.in_rotation && known && need.first + self.lag(replica, now) <= deadline
        };
        let in_time = self.replicas.iter().any(in_time);
        let born = self.replicas.iter().filter(|replica| replica.in_rotation);
        let born = born.filter_map(|replica| replica.born).max();
        if !self.away && born.is_some_and(|born| self.covering(born).is_none()) {
            self.wanted_since = self.wanted_since.max(born);
        }
        if in_time {
            Verdict::Wait
        } else {
            Verdict::Primary
        }
    }

    /// `Wait`: not yet known of the life that the connection belongs to.
    fn vouches(&self, replica: usize, since: Instant, opened: Instant) -> Verdict {
        let Some(replica_seen) = self.replicas.get(replica) else {
            return Verdict::Primary;
        };
        if !replica_seen.in_rotation {
            Verdict::Primary
        } else if replica_seen.asked.is_none_or(|asked| asked < opened) {
            Verdict::Wait
        } else if self.has_replayed(replica_seen, since) {
            Verdict::Fresh(replica)
        } else {
            Verdict::Primary
        }
    }

    /// How long ago the primary was first seen beyond what the replica has replayed.
    fn lag(&self, replica: &Replica, now: Instant) -> Duration {
        let beyond = self
            .samples
            .partition_point(|sample| sample.lsn <= replica.replayed);
        self.samples.get(beyond).map_or(Duration::ZERO, |sample| {
            now.saturating_duration_since(sample.first)
        })
    }

    fn wants_primary(&self) -> bool {
        self.wanted_since.is_some()
    }

    fn wants_replicas(&self, now: Instant) -> bool {
        self.wanted_until.is_some_and(|until| now < until)
    }

    fn wants_replica(&self, index: usize, now: Instant) -> bool {
        self.wants_replicas(now) && self.replicas[index].replayed < self.wanted_lsn
    }

    fn sampled(&mut self, started: Instant, lsn: u64) {
        match self.samples.back_mut() {
            Some(last) if last.lsn == lsn => last.last = started,
            // A crash lost what was never flushed: none of it can be a token.
            Some(last) if last.lsn > lsn => {
                self.samples.clear();
                self.samples.push_back(Sample {
                    lsn,
                    first: started,
                    last: started,
                });
            }
            Some(_) | None => self.samples.push_back(Sample {
                lsn,
                first: started,
                last: started,
            }),
        }
        if self.samples.len() > SAMPLES {
            self.samples.pop_front();
        }
        if self.wanted_since.is_some_and(|since| since <= started) {
            self.wanted_since = None;
        }
    }

    fn latest(&self) -> u64 {
        self.samples.back().map_or(0, |sample| sample.lsn)
    }

    /// Another connection to the primary: nothing sampled over the last one is trusted.
    fn primary_known(&mut self, identity: Identity) {
        let same = self
            .primary
            .as_ref()
            .is_some_and(|known| known.agrees_with(&identity));
        self.samples.clear();
        self.wanted_lsn = 0;
        self.primary = Some(identity);
        self.away = false;
        if !same {
            self.replicas
                .iter_mut()
                .for_each(|replica| replica.in_rotation = false);
        }
    }

    /// No sample can be had: those who need a new one need not wait.
    fn primary_away(&mut self) {
        self.away = true;
        self.wanted_since = None;
    }

    /// `None`: agrees, and is in rotation. Else why it is out.
    fn replayed(
        &mut self,
        index: usize,
        asked: Instant,
        lsn: u64,
        identity: Option<&Identity>,
    ) -> Option<Outside> {
        let outside = match (&self.primary, identity) {
            (None, _) => Some(Outside::PrimaryUnknown),
            (Some(primary), Some(identity)) if !primary.agrees_with(identity) => {
                Some(Outside::OtherHistory)
            }
            (Some(_), Some(_)) => None,
            // Between two looks at who it is.
            (Some(_), None) if self.replicas[index].in_rotation => None,
            (Some(_), None) => Some(Outside::Unverified),
        };
        self.replicas[index] = Replica {
            in_rotation: outside.is_none(),
            replayed: lsn,
            asked: Some(asked),
            born: self.replicas[index].born.or(Some(asked)),
        };
        outside
    }

    fn replica_lost(&mut self, index: usize) {
        self.replicas[index] = Replica::default();
    }
}

/// Why a replica that answers is not in rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Outside {
    #[error("the primary has not been seen yet")]
    PrimaryUnknown,
    #[error("not of the primary's system or timeline")]
    OtherHistory,
    #[error("not compared with the primary yet")]
    Unverified,
    #[error("not in recovery: promoted, or no replica")]
    Promoted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Primary,
    Replica(usize),
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("connection closed")]
    Closed,
    #[error("unexpected answer")]
    Answer,
    #[error(transparent)]
    Outside(#[from] Outside),
}

/// One server's sampler; never ends by itself.
async fn run(shared: Arc<Shared>, server: Server) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let began = Instant::now();
        let Err(error) = sample(&shared, server).await;
        if began.elapsed() > BACKOFF_MAX {
            backoff = BACKOFF_MIN;
        }
        leave(&shared, server, &error);
        sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

fn leave(shared: &Shared, server: Server, error: &ProbeError) {
    let upstream = match server {
        // Samples stay: reads they cover go on from the replicas while the primary is away.
        Server::Primary => {
            shared.window().primary_away();
            &shared.primary
        }
        Server::Replica(index) => {
            shared.window().replica_lost(index);
            &shared.replicas[index]
        }
    };
    shared.news.notify_waiters();
    if upstream.set_healthy(false) {
        warn!(upstream = upstream.name, role = ?upstream.role, error = words(error), "upstream left rotation");
    } else {
        debug!(upstream = upstream.name, role = ?upstream.role, error = words(error), "upstream still out of rotation");
    }
}

enum Never {}

async fn sample(shared: &Shared, server: Server) -> Result<Never, ProbeError> {
    let upstream = match server {
        Server::Primary => &shared.primary,
        Server::Replica(index) => &shared.replicas[index],
    };
    let (client, mut connection) = dial(&upstream.url, APPLICATION, shared.connect_timeout).await?;
    // The socket is watched beside every wait, so that a server that goes is seen at once and not at the next probe.
    let socket = poll_fn(|cx| connection.poll_message(cx));
    let drive = async {
        let mut socket = pin!(socket);
        loop {
            match socket.as_mut().await {
                Some(Ok(_notice)) => {}
                Some(Err(error)) => return ProbeError::Postgres(error),
                None => return ProbeError::Closed,
            }
        }
    };
    let work = async {
        match server {
            Server::Primary => sample_primary(shared, &client).await,
            Server::Replica(index) => sample_replica(shared, index, &client).await,
        }
    };
    tokio::select! {
        error = drive => Err(error),
        done = work => done,
    }
}

async fn sample_primary(shared: &Shared, client: &Client) -> Result<Never, ProbeError> {
    let row = one_row(
        client,
        "select substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8), current_setting('wal_block_size')",
    )
    .await?;
    let timeline = row.get(0).ok_or(ProbeError::Answer)?.to_owned();
    let block: u64 = row
        .get(1)
        .and_then(|size| size.parse().ok())
        .ok_or(ProbeError::Answer)?;
    let system = system_identifier(client).await?;
    shared.window().primary_known(Identity { system, timeline });
    loop {
        let started = Instant::now();
        let row = one_row(client, "select pg_current_wal_insert_lsn()").await?;
        let lsn = row
            .get(0)
            .and_then(parse_lsn)
            .map(|lsn| without_header(lsn, block))
            .ok_or(ProbeError::Answer)?;
        shared.window().sampled(started, lsn);
        shared.news.notify_waiters();
        shared.primary.set_lsn(lsn);
        entered(&shared.primary);
        sleep_until(started + shared.spacing).await;
        if !shared.window().wants_primary() {
            tokio::select! {
                () = shared.sample_primary.notified() => {}
                () = sleep_until(started + HEALTH) => {}
            }
        }
    }
}

async fn sample_replica(
    shared: &Shared,
    index: usize,
    client: &Client,
) -> Result<Never, ProbeError> {
    let replica = &shared.replicas[index];
    let system = system_identifier(client).await?;
    let mut looked: Option<Instant> = None;
    loop {
        let started = Instant::now();
        let row = one_row(
            client,
            "select pg_is_in_recovery(), pg_last_wal_replay_lsn()",
        )
        .await?;
        if row.get(0) != Some("t") {
            return Err(Outside::Promoted.into());
        }
        let lsn = row.get(1).and_then(parse_lsn).ok_or(ProbeError::Answer)?;
        let due = looked.is_none_or(|looked| looked.elapsed() >= HEALTH) || !replica.is_healthy();
        let identity = if due {
            looked = Some(started);
            Some(Identity {
                system: system.clone(),
                timeline: replayed_timeline(client).await?,
            })
        } else {
            None
        };
        let (outside, latest) = {
            let mut window = shared.window();
            (
                window.replayed(index, started, lsn, identity.as_ref()),
                window.latest(),
            )
        };
        shared.news.notify_waiters();
        replica.set_lsn(lsn);
        replica.set_lag_bytes(latest.saturating_sub(lsn));
        match outside {
            None => entered(replica),
            Some(reason) => {
                if replica.set_healthy(false) {
                    warn!(upstream = replica.name, %reason, "upstream left rotation");
                }
            }
        }
        sleep_until(started + SPACING).await;
        if !shared.window().wants_replica(index, Instant::now()) {
            tokio::select! {
                () = shared.sample_replica[index].notified() => {}
                () = sleep_until(started + if outside.is_some() { HEALTH / 10 } else { HEALTH }) => {}
            }
        }
    }
}

fn entered(upstream: &Upstream) {
    if !upstream.set_healthy(true) {
        info!(upstream = upstream.name, role = ?upstream.role, "upstream in rotation");
    }
}

/// Empty where the control role may not know.
async fn system_identifier(client: &Client) -> Result<String, ProbeError> {
    optional(one_row(client, "select system_identifier from pg_control_system()").await)
}

/// Spelled as in a WAL file's name: the history it follows, as far as it has got. What streams to it is asked for only once it has
/// been found to fork off behind what was replayed; where nothing streams, the last restartpoint tells, and that lags after a
/// failover, so the replica stays out until it is known to follow the new primary.
async fn replayed_timeline(client: &Client) -> Result<String, ProbeError> {
    optional(
        one_row(
            client,
            "select lpad(upper(to_hex(greatest((select timeline_id from pg_control_checkpoint()), \
             (select received_tli from pg_stat_wal_receiver where status = 'streaming')))), 8, '0')",
        )
        .await,
    )
}

fn optional(row: Result<SimpleQueryRow, ProbeError>) -> Result<String, ProbeError> {
    match row {
        Ok(row) => Ok(row.get(0).unwrap_or_default().to_owned()),
        Err(ProbeError::Postgres(error)) if error.as_db_error().is_some() => Ok(String::new()),
        Err(error) => Err(error),
    }
}

async fn one_row(client: &Client, sql: &str) -> Result<SimpleQueryRow, ProbeError> {
    let Ok(answer) = timeout(ANSWER_WAIT, client.simple_query(sql)).await else {
        return Err(ProbeError::Silent(ANSWER_WAIT));
    };
    let row = answer?.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.ok_or(ProbeError::Answer)
}

/// `pg_lsn` as text: `16/B374D848`.
fn parse_lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    Some(
        u64::from(u32::from_str_radix(high, 16).ok()?) << 32
            | u64::from(u32::from_str_radix(low, 16).ok()?),
    )
}

/// Where a record ended exactly with its page, the insert position is already past the next page's header (24 bytes, 40
/// on a segment's first), while the replay position stays at the page's start until another record comes. Header bytes
/// carry no record, so the page's start says the same, and a quiet replica qualifies.
fn without_header(lsn: u64, block: u64) -> u64 {
    match lsn % block {
        offset @ (24 | 40) => lsn - offset,
        _ => lsn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn identity(timeline: &str) -> Identity {
        Identity {
            system: "1".into(),
            timeline: timeline.into(),
        }
    }

    /// Samples at (ms, lsn), replicas that have replayed so much.
    fn window(start: Instant, samples: &[(u64, u64)], replayed: &[u64]) -> Window {
        let mut window = Window::new(replayed.len());
        window.primary_known(identity("1"));
        for &(at, lsn) in samples {
            window.sampled(start + MS(at), lsn);
        }
        for (index, &lsn) in replayed.iter().enumerate() {
            let asked = start;
            assert_eq!(
                window.replayed(index, asked, lsn, Some(&identity("1"))),
                None
            );
        }
        window
    }

    fn idle(_replica: usize) -> u32 {
        0
    }

    #[track_caller]
    fn check(
        samples: &[(u64, u64)],
        replayed: &[u64],
        since: u64,
        now: u64,
        wait: u64,
        expected: Verdict,
    ) {
        let start = Instant::now();
        let mut window = window(start, samples, replayed);
        let now = start + MS(now);
        assert_eq!(
            window.decide(start + MS(since), None, idle, now, now + MS(wait)),
            expected
        );
    }

    #[test]
    fn a_replica_is_fresh_once_it_has_replayed_the_first_sample_begun_since() {
        let samples = [(0, 100), (10, 200), (20, 300)];
        check(&samples, &[200], 10, 21, 20, Verdict::Fresh(0));
        check(&samples, &[200], 5, 21, 20, Verdict::Fresh(0));
        check(&samples, &[199], 10, 21, 20, Verdict::Wait);
        check(&samples, &[299], 11, 21, 20, Verdict::Wait);
        check(&samples, &[299, 300], 11, 21, 20, Verdict::Fresh(1));
        // A sample begun before the acknowledgement proves nothing, however high.
        check(&samples, &[999], 21, 21, 20, Verdict::Wait);
    }

    #[test]
    fn an_idle_primary_is_one_sample_that_reaches_to_its_last_look() {
        let samples = [(0, 100), (10, 100), (2000, 100)];
        check(&samples, &[100], 1500, 2001, 20, Verdict::Fresh(0));
        check(&samples, &[100], 2001, 2001, 20, Verdict::Wait);
    }

    #[test]
    fn a_replica_that_lags_beyond_the_wait_is_not_waited_for() {
        let samples = [(0, 100), (10, 200), (1000, 300)];
        // At 1001 it has been 991 ms behind: 300 would come at about 1991.
        check(&samples, &[150], 1000, 1001, 20, Verdict::Primary);
        check(&samples, &[150], 1000, 1001, 2000, Verdict::Wait);
        check(&samples, &[250], 1000, 1001, 20, Verdict::Wait);
    }

    #[test]
    fn the_preferred_replica_is_taken_if_fresh_and_the_others_in_turn() {
        let start = Instant::now();
        let mut window = window(start, &[(0, 100)], &[100, 50, 100]);
        let mut ask = |prefer| window.decide(start, prefer, idle, start, start);
        assert_eq!(ask(Some(2)), Verdict::Fresh(2));
        assert_eq!(ask(Some(1)), Verdict::Fresh(0));
        assert_eq!(ask(None), Verdict::Fresh(2));
        assert_eq!(ask(None), Verdict::Fresh(0));
        assert_eq!(ask(Some(9)), Verdict::Fresh(2));
    }

    #[test]
    fn the_least_busy_is_taken_and_one_that_is_known_is_kept_unless_it_is_much_busier() {
        let start = Instant::now();
        let mut window = window(start, &[(0, 100)], &[100, 100, 50]);
        let mut ask = |prefer, loads: [u32; 3]| {
            window.decide(start, prefer, |replica| loads[replica], start, start)
        };
        assert_eq!(ask(None, [3, 1, 0]), Verdict::Fresh(1));
        assert_eq!(ask(None, [1, 3, 0]), Verdict::Fresh(0));
        assert_eq!(ask(Some(0), [2 + AFFINITY, 1, 0]), Verdict::Fresh(0));
        assert_eq!(ask(Some(0), [3 + AFFINITY, 1, 0]), Verdict::Fresh(1));
        assert_eq!(ask(Some(2), [9, 9, 0]), Verdict::Fresh(0));
    }

    #[test]
    fn what_was_seen_of_a_replica_holds_for_connections_that_were_there() {
        let start = Instant::now();
        let mut window = window(start, &[(0, 100)], &[100]);
        let asked = start + MS(10);
        window.replayed(0, asked, 100, None);
        assert_eq!(window.vouches(0, start, asked), Verdict::Fresh(0));
        assert_eq!(window.vouches(0, start, asked + MS(1)), Verdict::Wait);
        window.replayed(0, asked + MS(2), 90, None);
        assert_eq!(window.vouches(0, start, asked + MS(1)), Verdict::Primary);
        window.replica_lost(0);
        assert_eq!(window.vouches(0, start, asked), Verdict::Primary);
    }

    #[test]
    fn a_replica_that_begins_again_serves_once_it_has_what_it_may_have_shown_before() {
        let start = Instant::now();
        let mut window = window(start, &[(0, 100), (10, 200)], &[200]);
        let ask = |window: &mut Window, now| {
            let now = start + MS(now);
            window.decide(start, None, idle, now, now + MS(20))
        };
        assert_eq!(ask(&mut window, 10), Verdict::Fresh(0));
        window.replica_lost(0);
        window.replayed(0, start + MS(20), 150, Some(&identity("1")));
        assert_eq!(ask(&mut window, 20), Verdict::Wait);
        assert!(window.wants_primary());
        window.sampled(start + MS(21), 200);
        assert_eq!(ask(&mut window, 21), Verdict::Wait);
        window.replayed(0, start + MS(22), 200, None);
        assert_eq!(ask(&mut window, 22), Verdict::Fresh(0));
    }

    #[test]
    fn without_the_primary_old_tokens_hold_and_new_ones_cannot_be_had() {
        let start = Instant::now();
        let mut window = window(start, &[(0, 100)], &[100]);
        window.primary_away();
        assert_eq!(
            window.decide(start, None, idle, start, start + MS(20)),
            Verdict::Fresh(0)
        );
        assert_eq!(
            window.decide(start + MS(1), None, idle, start, start + MS(20)),
            Verdict::Primary
        );
        assert!(!window.wants_primary());
    }

    #[test]
    fn another_timeline_drops_tokens_and_replicas_until_they_are_known_to_follow() {
        let start = Instant::now();
        let mut window = window(start, &[(0, 100)], &[500]);
        window.primary_known(identity("2"));
        window.sampled(start + MS(10), 120);
        let ask =
            |window: &mut Window| window.decide(start, None, idle, start + MS(10), start + MS(30));
        assert_eq!(ask(&mut window), Verdict::Primary);
        assert_eq!(
            window.replayed(0, start, 500, None),
            Some(Outside::Unverified)
        );
        assert_eq!(
            window.replayed(0, start, 500, Some(&identity("1"))),
            Some(Outside::OtherHistory)
        );
        assert_eq!(ask(&mut window), Verdict::Primary);
        assert_eq!(window.replayed(0, start, 130, Some(&identity("2"))), None);
        assert_eq!(ask(&mut window), Verdict::Fresh(0));
    }

    #[test]
    fn a_position_that_went_back_drops_what_was_sampled_before() {
        let start = Instant::now();
        let mut window = window(start, &[(0, 100), (1, 300), (2, 200)], &[250]);
        assert_eq!(window.covering(start).map(|sample| sample.lsn), Some(200));
        assert_eq!(window.samples.len(), 1);
        for n in 0..3000 {
            window.sampled(start + MS(10 + n), 1000 + n);
        }
        assert_eq!(window.samples.len(), SAMPLES);
    }

    #[test]
    fn positions_are_read_as_postgres_writes_them() {
        assert_eq!(parse_lsn("16/B374D848"), Some(0x16_B374_D848));
        assert_eq!(parse_lsn("0/0"), Some(0));
        for bad in ["", "16", "16/", "16/x", "1/2/3", "100000000/0"] {
            assert_eq!(parse_lsn(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_page_header_is_no_record() {
        for (lsn, expected) in [
            (8192 + 24, 8192),
            (16 << 20 | 40, 16 << 20),
            (8192 + 48, 8192 + 48),
            (8192, 8192),
        ] {
            assert_eq!(without_header(lsn, 8192), expected);
        }
        assert_eq!(without_header(8192 + 24, 32768), 8192 + 24);
    }
}
