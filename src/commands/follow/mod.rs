//! `flowgate follow`: a run, or a flow's runs, live: a tree drawn in place on a terminal, lines elsewhere, JSON for scripts; the
//! exit status is the outcome. An ordinary client of a Flowgate that listens; goes on behind the last event it had when it, the
//! proxy or Postgres was away. Writes nothing to any database. Called by `main`.
//!
//! `link` listens, `reader` reads rows, `view` is what is known of a run. This file decides which event is new: of a run each
//! `seq` counts once, whichever channel brought it.

mod event;
mod link;
mod reader;
mod view;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep, timeout};
use uuid::Uuid;

use self::event::{Event, Moment};
use self::link::{Ears, Heard, Note};
use self::reader::{Answer, Ask, Depth, here};
use self::view::RunView;
use super::picture::Status;
use super::screen::{Paint, Screen};
use crate::config::{ConnectUrl, parse_duration};
use crate::pgflow::events::{FLOW_PREFIX, run_topic};
use crate::pgflow::ids::{Slug, run_id};
use crate::server::control::words;

const HOST: &str = "127.0.0.1";
const PORT: &str = "6432";

const REDRAW: Duration = Duration::from_millis(100);
/// Between two looks at the rows of what is shown.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const LOOK_EVERY_JSON: Duration = Duration::from_secs(1);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// After the end of a run that failed: its steps' failures may come behind it, in the same commit.
const AFTERWORD: Duration = Duration::from_millis(200);
/// The rows say that a run is over, and no event does.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// How long the last picture may take.
const LAST_LOOK: Duration = Duration::from_secs(2);
/// Of a flow, runs under way at once; those beyond are counted and not followed.
const OPEN_MAX: usize = 1_000;
/// Of a flow, runs that are over and must not be taken for new ones.
const OVER_MAX: usize = 10_000;
/// Runs drawn as trees; more are a line each.
const TREES_MAX: usize = 3;
const LINES_MAX: usize = 16;
/// Questions and answers under way.
const ROOM: usize = 4;

const USAGE: u8 = 2;
const UNREACHABLE: u8 = 3;
const TIME_UP: u8 = 124;
const SIGNALLED: u8 = 128;
const INTERRUPT: u8 = 2;
const BROKEN_PIPE: u8 = 13;
const TERMINATE: u8 = 15;

/// Follow a run, or every run of a flow, live; the exit status is the run's outcome
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true)))]
#[command(after_help = "\
Exit status: 0 completed, 1 failed, 2 wrong usage or unknown run, 3 no connection, 124 --timeout, 130 Ctrl-C.
Left out of the URL, or without one: PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE and PGSSLMODE.")]
pub struct Args {
    /// The run
    #[arg(value_name = "RUN_ID", group = "what", value_parser = parse_run)]
    run: Option<Uuid>,
    /// Every run of this flow that is under way or begins, until told to end
    #[arg(long, value_name = "SLUG", group = "what", value_parser = parse_flow)]
    flow: Option<Slug>,
    /// A Flowgate [default: postgres://127.0.0.1:6432]
    #[arg(long, value_name = "URL", env = "FLOWGATE_URL", hide_env_values = true)]
    url: Option<String>,
    /// One event a line, as JSON, from the run's first on, each once
    #[arg(long)]
    json: bool,
    /// Events with a higher `seq` only: go on where an earlier call ended
    #[arg(long, value_name = "SEQ", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    #[arg(conflicts_with = "flow")]
    after: i64,
    /// Give up after this time: 90s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    timeout: Option<Duration>,
}

fn parse_run(text: &str) -> Result<Uuid, &'static str> {
    run_id(text).ok_or("not a run's id, which is a UUID")
}

fn parse_flow(text: &str) -> Result<Slug, &'static str> {
    Slug::parse(text).ok_or("not a flow's slug: letters, digits and _, not beginning with a digit")
}

fn parse_timeout(text: &str) -> Result<Duration, &'static str> {
    parse_duration(text).ok_or("an integer and a unit: 500ms, 90s, 5m, 1h, 1d")
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("{from}: {why}")]
    Url { from: &'static str, why: String },
    #[error("run {0} is unknown in this database")]
    NoRun(Uuid),
    #[error("flow {0} is unknown in this database")]
    NoFlow(Slug),
    #[error("cannot connect to {url}: {why}")]
    Unreachable { url: String, why: String },
    #[error("{0}")]
    Refused(String),
    #[error("writing: {0}")]
    Output(#[from] io::Error),
}

impl FollowError {
    fn code(&self) -> u8 {
        match self {
            Self::Url { .. } | Self::NoRun(_) | Self::NoFlow(_) => USAGE,
            Self::Unreachable { .. } | Self::Refused(_) => UNREACHABLE,
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                SIGNALLED + BROKEN_PIPE
            }
            Self::Output(_) => 1,
        }
    }
}

/// See `after_help`.
pub async fn run(args: Args) -> ExitCode {
    let (mut interrupt, mut terminate) = match (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) {
        (Ok(interrupt), Ok(terminate)) => (interrupt, terminate),
        (Err(error), _) | (_, Err(error)) => return complain(&error.into()),
    };
    let limit = args.timeout.unwrap_or(Duration::MAX);
    let told = tokio::select! {
        outcome = timeout(limit, Box::pin(follow(args))) => outcome,
        _ = interrupt.recv() => return ExitCode::from(SIGNALLED + INTERRUPT),
        _ = terminate.recv() => return ExitCode::from(SIGNALLED + TERMINATE),
    };
    match told {
        Ok(Ok(Status::Completed)) => ExitCode::SUCCESS,
        Ok(Ok(_failed)) => ExitCode::FAILURE,
        Ok(Err(error)) => complain(&error),
        Err(_elapsed) => {
            eprintln!("flowgate follow: not over after {limit:?}");
            ExitCode::from(TIME_UP)
        }
    }
}

fn complain(error: &FollowError) -> ExitCode {
    let quiet =
        matches!(error, FollowError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe);
    if !quiet {
        eprintln!("flowgate follow: {error}");
    }
    ExitCode::from(error.code())
}

/// From `--url`, or as libpq would have it; with Flowgate's own address where nobody says another.
fn connect_url(
    url: Option<&str>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<ConnectUrl, FollowError> {
    let escape = |text: &str| {
        percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
    };
    let said = |name: &str| env(name).filter(|value| !value.is_empty());
    if let Some(url) = url {
        let mut url: ConnectUrl =
            url.parse()
                .map_err(|error: crate::config::ConnectUrlError| FollowError::Url {
                    from: "--url",
                    why: error.to_string(),
                })?;
        if url.password.is_none() {
            url.password = said("PGPASSWORD").map(crate::config::Secret::new);
        }
        return Ok(url);
    }
    let user = said("PGUSER")
        .or_else(|| said("USER"))
        .unwrap_or_else(|| "postgres".to_owned());
    let database = said("PGDATABASE").unwrap_or_else(|| user.clone());
    let host = said("PGHOST").unwrap_or_else(|| HOST.to_owned());
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        escape(&host)
    };
    let port = said("PGPORT").unwrap_or_else(|| PORT.to_owned());
    let password =
        said("PGPASSWORD").map_or_else(String::new, |word| format!(":{}", escape(&word)));
    let mode =
        said("PGSSLMODE").map_or_else(String::new, |mode| format!("?sslmode={}", escape(&mode)));
    let text = format!(
        "postgres://{}{password}@{host}:{port}/{}{mode}",
        escape(&user),
        escape(&database)
    );
    text.parse()
        .map_err(|error: crate::config::ConnectUrlError| FollowError::Url {
            from: "the URL of PGHOST, PGPORT, PGUSER, PGDATABASE and PGSSLMODE",
            why: error.to_string(),
        })
}

async fn follow(args: Args) -> Result<Status, FollowError> {
    let url = connect_url(args.url.as_deref(), |name| std::env::var(name).ok())?;
    let what = match (args.run, args.flow) {
        (Some(run), _) => What::Run(run),
        (None, Some(flow)) => What::Flow(flow),
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let screen = Screen::new();
    let manner = match (args.json, screen.live) {
        (true, _) => Manner::Json,
        (false, true) => Manner::Picture,
        (false, false) => Manner::Lines,
    };
    let opened = Ears::open(&url).await;
    let mut ears = opened.map_err(|error| FollowError::Unreachable {
        url: url.to_string(),
        why: words(&error),
    })?;
    let (asks, asked) = mpsc::channel(ROOM);
    let (answer, mut answers) = mpsc::channel(ROOM);
    let depth = match manner {
        Manner::Json => Depth::States,
        Manner::Lines | Manner::Picture => Depth::Tasks,
    };
    let mut parts = JoinSet::new();
    parts.spawn(reader::run(url.clone(), depth, asked, answer));

    let mut watch = Watch::new(what, manner, screen, args.after, asks);
    watch.begin(&mut ears);
    let mut tick = tokio::time::interval(REDRAW);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            heard = ears.hear() => match heard {
                Heard::Note(note) => watch.hear(&note, &mut ears)?,
                Heard::InForce => watch.in_force(),
                Heard::Refused(error) => return Err(FollowError::Refused(words(&error))),
                Heard::Lost(error) => {
                    let why = error.map_or_else(|| "closed".to_owned(), |error| words(&error));
                    watch.lost(&why);
                    ears = come_back(&url, &mut watch).await?;
                    watch.begin(&mut ears);
                }
            },
            Some(answer) = answers.recv() => watch.learn(answer, &mut ears)?,
            _ = tick.tick() => {}
        }
        if let Some(outcome) = watch.turn(&mut ears)? {
            watch.settle()?;
            return Ok(outcome);
        }
    }
}

/// As long as it takes, unless Postgres itself says no.
async fn come_back(url: &ConnectUrl, watch: &mut Watch) -> Result<Ears, FollowError> {
    loop {
        sleep(watch.backoff).await;
        // Until channels are in force again: a proxy may let us in and have no Postgres.
        watch.backoff = (watch.backoff * 2).min(BACKOFF_MAX);
        match Ears::open(url).await {
            Ok(ears) => return Ok(ears),
            Err(error) if error.is_final() => return Err(FollowError::Refused(words(&error))),
            Err(_away) => watch.draw()?,
        }
    }
}

#[derive(Clone, Debug)]
enum What {
    Run(Uuid),
    Flow(Slug),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Picture,
    Lines,
    Json,
}

/// One run that is followed.
struct Followed {
    view: RunView,
    /// The last that was told.
    seq: i64,
    /// Its own channel is listened to on this connection, so it repairs what another left out.
    own_channel: bool,
    /// What ended it, and when that was heard or seen.
    ended: Option<(Status, Instant)>,
    /// The rows say so.
    seen_over: Option<(Status, Instant)>,
    /// They were read after `ended`.
    seen_last: bool,
}

struct Watch {
    what: What,
    manner: Manner,
    screen: Screen,
    after: i64,
    asks: mpsc::Sender<Ask>,
    runs: HashMap<Uuid, Followed>,
    /// As they came.
    order: VecDeque<Uuid>,
    over: HashSet<Uuid>,
    over_order: VecDeque<Uuid>,
    /// Runs too many to be followed.
    left_out: HashSet<Uuid>,
    /// Why there is no connection.
    away: Option<String>,
    /// The last word of the connection.
    last_word: Instant,
    last_look: Option<Instant>,
    looks_out: usize,
    next_look: usize,
    runs_asked: bool,
    /// When watching a flow began, and how far the server's clock is ahead.
    since: Option<Moment>,
    ahead: f64,
    drawn: Option<Instant>,
    backoff: Duration,
}

impl Watch {
    fn new(
        what: What,
        manner: Manner,
        screen: Screen,
        after: i64,
        asks: mpsc::Sender<Ask>,
    ) -> Self {
        let mut watch = Self {
            what,
            manner,
            screen,
            after,
            asks,
            runs: HashMap::new(),
            order: VecDeque::new(),
            over: HashSet::new(),
            over_order: VecDeque::new(),
            left_out: HashSet::new(),
            away: None,
            last_word: Instant::now(),
            last_look: None,
            looks_out: 0,
            next_look: 0,
            runs_asked: false,
            since: None,
            ahead: 0.0,
            drawn: None,
            backoff: BACKOFF_MIN,
        };
        if let What::Run(run) = watch.what {
            watch.add(run);
        }
        watch
    }

    fn add(&mut self, run: Uuid) {
        let followed = Followed {
            view: RunView::new(run),
            seq: self.after,
            own_channel: false,
            ended: None,
            seen_over: None,
            seen_last: false,
        };
        self.runs.insert(run, followed);
        self.order.push_back(run);
    }

    /// A new connection: everything is asked for again, behind what is known.
    fn begin(&mut self, ears: &mut Ears) {
        self.last_word = Instant::now();
        if let What::Flow(flow) = &self.what {
            ears.listen(&format!("{FLOW_PREFIX}{flow}"));
            self.runs_asked = false;
        }
        for followed in self.runs.values_mut() {
            followed.own_channel = false;
        }
        let open: Vec<Uuid> = self.order.iter().copied().collect();
        for run in open {
            self.listen(run, ears);
        }
    }

    /// To the run's own channel, from behind the last event told.
    fn listen(&mut self, run: Uuid, ears: &mut Ears) {
        if let Some(followed) = self.runs.get_mut(&run) {
            ears.listen(&format!("{}@{}", run_topic(run), followed.seq));
            followed.own_channel = true;
        }
    }

    fn in_force(&mut self) {
        self.last_word = Instant::now();
        self.backoff = BACKOFF_MIN;
        if self.away.take().is_some() {
            self.remark("connected again");
        }
        if let What::Flow(flow) = &self.what
            && !self.runs_asked
        {
            let ask = Ask::Runs {
                flow: flow.to_string(),
                since: self.since,
            };
            self.runs_asked = self.asks.try_send(ask).is_ok();
        }
    }

    fn lost(&mut self, why: &str) {
        if self.away.is_none() {
            self.remark(&format!("connection lost ({why}); trying again"));
        }
        self.away = Some(why.to_owned());
    }

    /// Beside the events: never on standard output.
    fn remark(&self, text: &str) {
        if self.manner != Manner::Picture {
            eprintln!("flowgate follow: {text}");
        }
    }

    fn hear(&mut self, note: &Note, ears: &mut Ears) -> Result<(), FollowError> {
        self.last_word = Instant::now();
        let Some(event) = Event::read(&note.payload) else {
            return Ok(());
        };
        if event.kind == "gap" {
            return self.gap(&event, &note.payload, ears);
        }
        // A task's signal: no part of the order, and not told.
        let (Some(run), Some(seq)) = (event.run, event.seq) else {
            return Ok(());
        };
        let own = !note.channel.starts_with(FLOW_PREFIX);
        let known = self.runs.contains_key(&run);
        if !known && (matches!(self.what, What::Run(_)) || !self.admit(run)) {
            return Ok(());
        }
        let several = matches!(self.what, What::Flow(_));
        let Some(followed) = self.runs.get_mut(&run) else {
            return Ok(());
        };
        if seq <= followed.seq {
            return Ok(());
        }
        if !own && seq > followed.seq + 1 {
            // Something is missing; the run's own channel brings it, and this one again.
            if !followed.own_channel {
                self.listen(run, ears);
            }
            return Ok(());
        }
        followed.seq = seq;
        let line = followed.view.note(&event, several);
        if let Some(outcome) = event.ends() {
            followed.ended = Some((outcome, Instant::now()));
        }
        match self.manner {
            Manner::Json => self.print(&note.payload),
            Manner::Lines => self.print(&line),
            Manner::Picture => Ok(()),
        }
    }

    /// A run nobody has heard of yet, if there is room for it.
    fn admit(&mut self, run: Uuid) -> bool {
        if self.over.contains(&run) || self.left_out.contains(&run) {
            return false;
        }
        if self.runs.len() < OPEN_MAX {
            self.add(run);
            return true;
        }
        if self.left_out.is_empty() {
            self.remark(&format!(
                "more than {OPEN_MAX} runs at once; those beyond are not followed"
            ));
        }
        if self.left_out.len() < OVER_MAX {
            self.left_out.insert(run);
        }
        false
    }

    fn gap(&mut self, event: &Event, payload: &str, ears: &mut Ears) -> Result<(), FollowError> {
        if event.run.is_none() {
            // A flow's: each run's own channel knows what is missing.
            let open: Vec<Uuid> = self.order.iter().copied().collect();
            for run in open {
                self.listen(run, ears);
            }
            self.runs_asked = false;
            return Ok(());
        }
        match self.manner {
            Manner::Json => self.print(payload),
            Manner::Lines => {
                self.print("(events that are no longer kept, or came too fast, are left out here)")
            }
            Manner::Picture => Ok(()),
        }
    }

    fn learn(&mut self, answer: Answer, ears: &mut Ears) -> Result<(), FollowError> {
        let several = matches!(self.what, What::Flow(_));
        match answer {
            Answer::Run(seen) => {
                self.looks_out = self.looks_out.saturating_sub(1);
                self.ahead = seen.now - here();
                let Some(followed) = self.runs.get_mut(&seen.run) else {
                    return Ok(());
                };
                let lines = followed.view.see(&seen, several);
                if matches!(seen.status, Status::Completed | Status::Failed) {
                    followed
                        .seen_over
                        .get_or_insert((seen.status, Instant::now()));
                    followed.seen_last = true;
                }
                if self.manner == Manner::Lines {
                    lines.iter().try_for_each(|line| self.print(line))?;
                }
                Ok(())
            }
            Answer::NoRun(run) => {
                self.looks_out = self.looks_out.saturating_sub(1);
                match &self.what {
                    What::Run(_) => Err(FollowError::NoRun(run)),
                    What::Flow(_) => {
                        self.forget(run, ears);
                        Ok(())
                    }
                }
            }
            Answer::NoFlow => match &self.what {
                What::Flow(flow) => Err(FollowError::NoFlow(flow.clone())),
                What::Run(_) => Ok(()),
            },
            Answer::Runs { runs, now } => {
                self.ahead = now - here();
                self.since.get_or_insert(now - 1.0);
                for run in runs {
                    if !self.runs.contains_key(&run) && self.admit(run) {
                        self.listen(run, ears);
                    }
                }
                Ok(())
            }
            Answer::Refused(why) => Err(FollowError::Refused(why)),
        }
    }

    fn forget(&mut self, run: Uuid, ears: &mut Ears) {
        if self
            .runs
            .remove(&run)
            .is_some_and(|followed| followed.own_channel)
        {
            ears.unlisten(&run_topic(run));
        }
        self.order.retain(|known| *known != run);
        self.over.insert(run);
        self.over_order.push_back(run);
        if self.over_order.len() > OVER_MAX
            && let Some(oldest) = self.over_order.pop_front()
        {
            self.over.remove(&oldest);
        }
    }

    /// Looks, draws, and says how it ended.
    fn turn(&mut self, ears: &mut Ears) -> Result<Option<Status>, FollowError> {
        self.look();
        self.draw()?;
        match self.what {
            What::Run(run) => Ok(self.runs.get(&run).and_then(|run| self.outcome(run))),
            What::Flow(_) => {
                let ended = |run: &&Uuid| {
                    let followed = self.runs.get(*run);
                    followed.is_some_and(|followed| self.outcome(followed).is_some())
                };
                let ended: Vec<Uuid> = self.order.iter().filter(ended).copied().collect();
                for run in ended {
                    self.close(run, ears)?;
                }
                Ok(None)
            }
        }
    }

    fn outcome(&self, run: &Followed) -> Option<Status> {
        match (run.ended, run.seen_over) {
            (Some((outcome, at)), _) => {
                let (patience, content) = match self.manner {
                    Manner::Picture => (LAST_LOOK, run.seen_last),
                    Manner::Lines | Manner::Json => (Duration::ZERO, true),
                };
                let told = outcome == Status::Completed || self.last_word.elapsed() > AFTERWORD;
                (told && (content || at.elapsed() > patience)).then_some(outcome)
            }
            (None, Some((outcome, at))) => {
                let quiet = self.away.is_none()
                    && at.elapsed() > SILENCE_MAX
                    && self.last_word.elapsed() > SILENCE_MAX;
                if quiet {
                    self.remark(&format!(
                        "run {} is over, but its last events did not come: they are no longer kept, or this is no Flowgate",
                        run.view.id
                    ));
                }
                quiet.then_some(outcome)
            }
            (None, None) => None,
        }
    }

    /// A run of a flow is over: its picture stays.
    fn close(&mut self, run: Uuid, ears: &mut Ears) -> Result<(), FollowError> {
        if let Some(followed) = self.runs.get(&run)
            && self.manner == Manner::Picture
        {
            let lines = followed.view.picture(&self.screen, self.now());
            self.screen.draw(&[])?;
            lines.iter().try_for_each(|line| self.screen.line(line))?;
        }
        self.forget(run, ears);
        Ok(())
    }

    /// Asks for the rows of what is shown, one run after another.
    fn look(&mut self) {
        let every = match self.manner {
            Manner::Json => LOOK_EVERY_JSON,
            Manner::Lines | Manner::Picture => LOOK_EVERY,
        };
        let shown = self.order.len().min(LINES_MAX);
        let ending = self
            .order
            .iter()
            .find(|run| {
                let followed = self.runs.get(*run);
                followed.is_some_and(|followed| followed.ended.is_some() && !followed.seen_last)
            })
            .copied();
        let due = self.last_look.is_none_or(|last| last.elapsed() >= every);
        let due = due || ending.is_some() && self.manner == Manner::Picture;
        if shown == 0 || self.looks_out > 0 || !due {
            return;
        }
        self.next_look = (self.next_look + 1) % shown;
        let run = ending.or_else(|| {
            self.order
                .get(self.order.len() - 1 - self.next_look)
                .copied()
        });
        if let Some(run) = run
            && self.asks.try_send(Ask::Look(run)).is_ok()
        {
            self.looks_out += 1;
            // A round of all that is shown takes `every`.
            if self.next_look == 0 || self.last_look.is_none() {
                self.last_look = Some(Instant::now());
            }
        }
    }

    fn now(&self) -> Moment {
        here() + self.ahead
    }

    fn draw(&mut self) -> Result<(), FollowError> {
        let recent = self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW / 2);
        if self.manner != Manner::Picture || recent {
            return Ok(());
        }
        self.drawn = Some(Instant::now());
        let now = self.now();
        let mut lines = Vec::new();
        let shown: Vec<&RunView> = self
            .order
            .iter()
            .rev()
            .take(LINES_MAX)
            .filter_map(|run| self.runs.get(run))
            .map(|followed| &followed.view)
            .collect();
        let trees = self.order.len() <= TREES_MAX;
        for view in shown {
            if trees {
                lines.extend(view.picture(&self.screen, now));
            } else {
                lines.push(view.summary(&self.screen, now));
            }
        }
        if let Some(more @ 1..) = self.order.len().checked_sub(LINES_MAX) {
            lines.push(format!("… and {more} more"));
        }
        if lines.is_empty() {
            lines.push(self.screen.paint(Paint::Dim, "no run is under way"));
        }
        if let Some(why) = &self.away {
            let text = format!("connection lost ({why}); trying again");
            lines.push(self.screen.paint(Paint::Yellow, &text));
        }
        Ok(self.screen.draw(&lines)?)
    }

    fn settle(&mut self) -> Result<(), FollowError> {
        self.drawn = None;
        self.draw()?;
        self.screen.settle();
        Ok(())
    }

    fn print(&self, line: &str) -> Result<(), FollowError> {
        let mut out = io::stdout().lock();
        writeln!(out, "{line}")?;
        Ok(out.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: Option<&str>, env: &[(&str, &str)], expected: &str) {
        let find = |name: &str| {
            let found = env.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let shown = match connect_url(url, find) {
            Ok(url) => {
                let word = url.password.as_ref().map(|word| word.expose().to_owned());
                format!("{url} {}", word.unwrap_or_default())
            }
            Err(error) => error.to_string(),
        };
        assert_eq!(shown.trim_end(), expected);
    }

    #[test]
    fn where_to_is_what_libpq_would_say_and_flowgate_else() {
        check(None, &[], "postgres://postgres@127.0.0.1:6432/postgres");
        check(
            None,
            &[("USER", "ada")],
            "postgres://ada@127.0.0.1:6432/ada",
        );
        check(
            None,
            &[
                ("PGHOST", "::1"),
                ("PGPORT", "7"),
                ("PGUSER", "a b"),
                ("PGPASSWORD", "p@:/"),
                ("PGDATABASE", "d"),
                ("PGSSLMODE", "require"),
            ],
            "postgres://a%20b@[::1]:7/d?sslmode=require p@:/",
        );
        check(
            Some("postgres://u@db:1/x"),
            &[("PGPASSWORD", "p"), ("PGHOST", "elsewhere")],
            "postgres://u@db:1/x p",
        );
        check(
            Some("mysql://u@db"),
            &[],
            "--url: starts with `mysql://`; write postgres://user:password@host:port/database",
        );
        check(
            None,
            &[("PGHOST", "/run/postgresql")],
            "the URL of PGHOST, PGPORT, PGUSER, PGDATABASE and PGSSLMODE: names a Unix socket; Flowgate reaches Postgres by TCP, so name a host",
        );
    }
}
