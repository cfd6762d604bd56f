//! Random flows, driven to their end by workers that fail, die and come late, and compared with what the contract says
//! must come out: a reference computed here, in Rust, from the same definition and the same handler.
//!
//! `FLOWGATE_SEED=n` repeats a run's flows, inputs and fates (not the order in which the server gets to them);
//! `FLOWGATE_DAGS=n` makes more of them.
//!
//! Each task has a script, one act a hand-out: die, fail, succeed. A dead worker's task is put back as a requeue would: the
//! row `queued` again, the message visible, the attempt counted. So the n-th hand-out of a task is its attempt n, and a
//! task handed out twice for one attempt shows at the end as a row that counts fewer attempts than were acted on.
//!
//! At 0.14 steps also have conditions, and say what follows where one is not met or a handler has failed for good; `core14` runs it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flowgate::schema::PgflowApi;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{Core, WORKER, invariants, show};
use crate::support::proxy::connect;

const DAGS: u64 = 120;
const WORKERS: u64 = 6;
const SEED: u64 = 20_250_717;
const PATIENCE: Duration = Duration::from_secs(300);

/// The seed of this run: the environment's, or always the same.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("FLOWGATE_SEED").ok();
    given.map_or(SEED, |text| {
        text.parse().expect("FLOWGATE_SEED is a number")
    })
}

/// splitmix64: a sequence, or with `mix` a hash.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

fn mix(parts: &[u64]) -> u64 {
    parts
        .iter()
        .fold(0, |hash, part| Chance(hash ^ part).next())
}

/// Of a JSON value, whatever the order of its keys.
fn hash(value: &Value) -> u64 {
    match value {
        Value::Array(items) => items
            .iter()
            .fold(1, |hashed, item| mix(&[hashed, hash(item)])),
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            let text = |text: &str| hash(&Value::String(text.to_owned()));
            sorted.into_iter().fold(2, |hashed, (key, item)| {
                mix(&[hashed, text(key), hash(item)])
            })
        }
        scalar => scalar
            .to_string()
            .bytes()
            .fold(3, |hashed, byte| mix(&[hashed, u64::from(byte)])),
    }
}

// What a run is, and must become ----------------------------------------------------------------------------------------

struct Step {
    slug: String,
    is_map: bool,
    /// Places in `Flow::steps`.
    deps: Vec<usize>,
    /// A map depends on it: its output must be an array.
    feeds_map: bool,
    max_attempts: u32,
    asks: Vec<Condition>,
    when_unmet: Follows,
    when_exhausted: Follows,
}

/// What its input must contain, or must not.
struct Condition {
    pattern: Value,
    required: bool,
}

/// What becomes of a step whose condition is not met, or whose handler has failed for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Follows {
    Fail,
    Skip,
    SkipCascade,
}

impl Follows {
    fn any(chance: &mut Chance) -> Self {
        [Self::Fail, Self::Skip, Self::SkipCascade][chance.below(3) as usize]
    }

    fn name(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Skip => "skip",
            Self::SkipCascade => "skip-cascade",
        }
    }
}

/// How a step of a run ends, if it does.
enum End {
    Completed(Value),
    Skipped {
        reason: &'static str,
        cascades: bool,
    },
    Never,
}

struct Flow {
    slug: String,
    steps: Vec<Step>,
}

/// What a worker does with a task it was handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Succeed,
    Fail,
    /// Is not heard of again; `Death` says how far it came.
    Die(Death),
    /// The same, and nobody ever puts the task back.
    Abandon,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Silent,
    /// In the middle of the transaction that completes or fails the task.
    Completing,
    Failing,
    /// Not dead at all: completes the task after it was put back.
    Late,
}

#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Completed(Value),
    /// One of these errors, of these steps.
    Failed(HashMap<String, HashSet<String>>),
    /// These tasks were abandoned.
    Hangs,
}

struct Run {
    id: Uuid,
    flow: usize,
    seed: u64,
    input: Value,
    fate: Fate,
    /// Of each step that can start: what each of its tasks is given, must give, and whether it can complete.
    tasks: HashMap<(String, i32), Task>,
    outputs: HashMap<String, Value>,
    /// Why each step that is skipped is.
    skipped: HashMap<String, &'static str>,
}

struct Task {
    input: Value,
    output: Value,
    script: Vec<Act>,
}

/// A random flow of up to 10 steps, in the order they are added; slugs are in no order.
fn make_flow(chance: &mut Chance, number: u64, api: PgflowApi) -> Flow {
    let mut letters: Vec<char> = ('a'..='p').collect();
    let mut steps: Vec<Step> = Vec::new();
    for place in 0..chance.below(10) as usize + usize::from(!chance.percent(3)) {
        let letter = letters.swap_remove(chance.below(letters.len() as u64) as usize);
        let is_map = chance.percent(45);
        let most = if is_map { 1 } else { 3 };
        let wanted = chance.below(most + 1).min(place as u64);
        let mut deps: Vec<usize> = (0..wanted)
            .map(|_| chance.below(place as u64) as usize)
            .collect();
        deps.sort_unstable();
        deps.dedup();
        if is_map {
            deps.iter().for_each(|&dep| steps[dep].feeds_map = true);
        }
        let max_attempts = [0, 1, 2, 3, 5][chance.below(5) as usize];
        let (asks, when_unmet, when_exhausted) = match api {
            PgflowApi::V0_7 => (Vec::new(), Follows::Fail, Follows::Fail),
            PgflowApi::V0_14 => {
                let slugs: Vec<_> = deps.iter().map(|&dep| steps[dep].slug.clone()).collect();
                let asks = make_conditions(chance, &slugs);
                (asks, Follows::any(chance), Follows::any(chance))
            }
        };
        steps.push(Step {
            slug: format!("{letter}{}", chance.below(3)),
            is_map,
            deps,
            feeds_map: false,
            max_attempts,
            asks,
            when_unmet,
            when_exhausted,
        });
    }
    Flow {
        slug: format!(
            "{}dag{number}",
            if chance.percent(10) { "Mixed" } else { "" }
        ),
        steps,
    }
}

/// Such as inputs meet now and then: `any_json` makes objects with `é`, `handle` ones with `of`, and dependencies are keys.
fn make_conditions(chance: &mut Chance, deps: &[String]) -> Vec<Condition> {
    let mut asks = Vec::new();
    for required in [true, false] {
        if !chance.percent(18) {
            continue;
        }
        let pattern = match (chance.below(4), deps) {
            (0, _) => json!({}),
            (1, _) | (_, []) => json!({ "é": chance.below(10) }),
            (2, [first, ..]) => json!({ first.as_str(): { "of": first } }),
            (_, [first, ..]) => json!({ first.as_str(): [] }),
        };
        asks.push(Condition { pattern, required });
    }
    asks
}

/// `@>` of jsonb, as far as these patterns go: an array also contains a scalar, which none of them is.
fn contains(value: &Value, pattern: &Value) -> bool {
    match (value, pattern) {
        (Value::Object(value), Value::Object(pattern)) => pattern
            .iter()
            .all(|(key, pattern)| value.get(key).is_some_and(|value| contains(value, pattern))),
        (Value::Array(value), Value::Array(pattern)) => pattern
            .iter()
            .all(|pattern| value.iter().any(|value| contains(value, pattern))),
        _ => value == pattern,
    }
}

fn define(flow: &Flow, chance: &mut Chance, api: PgflowApi) -> String {
    let slug = &flow.slug;
    // Half of the steps' options stand with the flow: those of tasks that may try 5 times.
    let mut sql = format!(
        "select pgflow.create_flow('{slug}', max_attempts => 5, base_delay => 0, timeout => 600);"
    );
    for step in &flow.steps {
        let deps: Vec<_> = step
            .deps
            .iter()
            .map(|&dep| flow.steps[dep].slug.as_str())
            .collect();
        let kind = match (step.is_map, chance.percent(20)) {
            (true, _) => "'map'",
            (false, true) => "null",
            (false, false) => "'single'",
        };
        let attempts = match step.max_attempts {
            5 => "null".to_owned(),
            own => own.to_string(),
        };
        let delay = if chance.percent(50) { "0" } else { "null" };
        let mut more = String::new();
        if api == PgflowApi::V0_14 {
            let (unmet, exhausted) = (step.when_unmet.name(), step.when_exhausted.name());
            more += &format!(", when_unmet => '{unmet}', when_exhausted => '{exhausted}'");
        }
        for asks in &step.asks {
            let which = if asks.required {
                "required"
            } else {
                "forbidden"
            };
            more += &format!(", {which}_input_pattern => {}", literal(&asks.pattern));
        }
        sql += &format!(
            "select pgflow.add_step('{slug}', '{}', '{{{}}}', step_type => {kind}, max_attempts => {attempts}, start_delay => {delay}{more});",
            step.slug,
            deps.join(",")
        );
    }
    sql
}

/// Any JSON, not too deep, of small whole numbers.
fn any_json(chance: &mut Chance, depth: u32) -> Value {
    match chance.below(if depth > 2 { 5 } else { 7 }) {
        0 => Value::Null,
        1 => json!(chance.below(1000)),
        2 => json!(format!("text '{}' \\ ü", chance.below(1000))),
        3 => json!(chance.percent(50)),
        4 => json!([]),
        5 => (0..chance.below(3))
            .map(|_| any_json(chance, depth + 1))
            .collect(),
        _ => json!({ "run": any_json(chance, depth + 1), "é": chance.below(10) }),
    }
}

/// What a step's code makes of a task's input. Whatever the task was given shows in what comes out.
fn handle(seed: u64, step: &Step, index: i32, input: &Value, violates: bool) -> Value {
    let place = step
        .slug
        .bytes()
        .fold(0, |hash, byte| mix(&[hash, u64::from(byte)]));
    let mut chance = Chance(mix(&[seed, place, index as u64, hash(input)]));
    let mark = json!(chance.below(1_000_000_000));
    if step.feeds_map && !step.is_map {
        if violates {
            let wrong = [
                Value::Null,
                json!({ "mark": mark }),
                json!("text"),
                mark,
                json!(true),
            ];
            return wrong[chance.below(5) as usize].clone();
        }
        // A quarter of them empty.
        let size = chance.below(8).saturating_sub(1);
        return (0..size)
            .map(|_| {
                if chance.percent(60) {
                    json!([mark, any_json(&mut chance, 0)])
                } else {
                    any_json(&mut chance, 1)
                }
            })
            .collect();
    }
    match chance.below(10) {
        0 => Value::Null,
        1 => any_json(&mut chance, 0),
        _ => json!({ "of": step.slug, "mark": mark, "any": any_json(&mut chance, 1) }),
    }
}

/// What the task will live through. Only one that ends well may die, and never so often that its tries run out.
fn script(chance: &mut Chance, step: &Step) -> Vec<Act> {
    if chance.percent(3) {
        return vec![Act::Fail];
    }
    if chance.percent(1) {
        return vec![Act::Abandon];
    }
    let mut acts = Vec::new();
    while (acts.len() as u32) + 1 < step.max_attempts && chance.percent(25) {
        acts.push(match chance.below(8) {
            0 => Act::Die(Death::Silent),
            1 => Act::Die(Death::Completing),
            2 => Act::Die(Death::Failing),
            3 => Act::Die(Death::Late),
            _ => Act::Fail,
        });
    }
    acts.push(Act::Succeed);
    acts
}

/// Works the whole run out, as if nothing ever went wrong that its scripts don't say.
fn make_run(chance: &mut Chance, flows: &[Flow], flow: usize, api: PgflowApi) -> Run {
    let seed = chance.next();
    let steps = &flows[flow].steps;
    let root_map = steps.iter().any(|step| step.is_map && step.deps.is_empty());
    let input = if root_map {
        (0..chance.below(8).saturating_sub(1))
            .map(|_| any_json(chance, 0))
            .collect()
    } else {
        any_json(chance, 0)
    };
    let mut tasks = HashMap::new();
    let mut ends: Vec<End> = Vec::new();
    let mut errors: HashMap<String, HashSet<String>> = HashMap::new();
    let mut hangs = false;
    for step in steps {
        let parents: Vec<_> = step
            .deps
            .iter()
            .map(|&dep| (&steps[dep].slug, &ends[dep]))
            .collect();
        // Whatever else it waits for.
        if parents
            .iter()
            .any(|(_, end)| matches!(end, End::Skipped { cascades: true, .. }))
        {
            ends.push(End::Skipped {
                reason: "dependency_skipped",
                cascades: true,
            });
            continue;
        }
        // Something before it never ends, so it never starts.
        if parents.iter().any(|(_, end)| matches!(end, End::Never)) {
            ends.push(End::Never);
            continue;
        }
        let from_deps: serde_json::Map<_, _> = parents
            .iter()
            .filter_map(|(slug, end)| match end {
                End::Completed(output) => Some(((*slug).clone(), output.clone())),
                End::Skipped { .. } | End::Never => None,
            })
            .collect();
        let asked = if step.deps.is_empty() {
            input.clone()
        } else {
            Value::Object(from_deps.clone())
        };
        if step
            .asks
            .iter()
            .any(|asks| contains(&asked, &asks.pattern) != asks.required)
        {
            ends.push(match step.when_unmet {
                Follows::Fail => {
                    let error = "Condition not met".to_owned();
                    errors.entry(step.slug.clone()).or_default().insert(error);
                    End::Never
                }
                follows => End::Skipped {
                    reason: "condition_unmet",
                    cascades: follows == Follows::SkipCascade,
                },
            });
            continue;
        }
        let given: Vec<Value> = if step.is_map {
            match parents.first() {
                None => input.as_array().expect("maps get arrays").clone(),
                Some((_, End::Completed(source))) => {
                    source.as_array().expect("maps get arrays").clone()
                }
                Some(_) => Vec::new(),
            }
        } else {
            let mut object = from_deps;
            if api == PgflowApi::V0_7 {
                object.insert("run".to_owned(), input.clone());
            }
            vec![Value::Object(object)]
        };

        let mut results = Vec::new();
        let (mut broken, mut abandoned, mut mistyped) = (Vec::new(), false, false);
        for (index, input) in (0_i32..).zip(given) {
            let violates = step.feeds_map && !step.is_map && chance.percent(12);
            let output = handle(seed, step, index, &input, violates);
            let script = if violates {
                vec![Act::Succeed]
            } else {
                script(chance, step)
            };
            if violates {
                let map = steps.iter().filter(|map| {
                    map.is_map && map.deps.iter().any(|&dep| steps[dep].slug == step.slug)
                });
                let kind = match &output {
                    Value::Null => "null",
                    Value::Object(_) => "object",
                    Value::String(_) => "string",
                    Value::Number(_) => "number",
                    _ => "boolean",
                };
                errors.entry(step.slug.clone()).or_default().extend(map.map(|map| {
                    format!(
                        "[TYPE_VIOLATION] Map step {} expects array input but dependency {} produced {kind}",
                        map.slug, step.slug
                    )
                }));
                mistyped = true;
            }
            match script[0] {
                Act::Fail if script.len() == 1 => {
                    broken.push(format!("{} {index} broke", step.slug))
                }
                Act::Abandon => abandoned = true,
                _ => {}
            }
            results.push(output.clone());
            let task = Task {
                input,
                output,
                script,
            };
            tasks.insert((step.slug.clone(), index), task);
        }
        ends.push(match step.when_exhausted {
            _ if mistyped => End::Never,
            Follows::Fail if !broken.is_empty() => {
                errors.entry(step.slug.clone()).or_default().extend(broken);
                hangs |= abandoned;
                End::Never
            }
            follows if !broken.is_empty() => End::Skipped {
                reason: "handler_failed",
                cascades: follows == Follows::SkipCascade,
            },
            _ if abandoned => {
                hangs = true;
                End::Never
            }
            _ if step.is_map => End::Completed(Value::Array(results)),
            _ => End::Completed(results.remove(0)),
        });
    }
    let (mut outputs, mut skipped) = (HashMap::new(), HashMap::new());
    for (step, end) in steps.iter().zip(ends) {
        match end {
            End::Completed(output) => {
                outputs.insert(step.slug.clone(), output);
            }
            End::Skipped { reason, .. } => {
                skipped.insert(step.slug.clone(), reason);
            }
            End::Never => {}
        }
    }
    let leaves =
        (0..steps.len()).filter(|place| !steps.iter().any(|step| step.deps.contains(place)));
    let fate = if !errors.is_empty() {
        Fate::Failed(errors)
    } else if hangs {
        Fate::Hangs
    } else {
        let output: serde_json::Map<_, _> = leaves
            .filter_map(|leaf| outputs.get_key_value(&steps[leaf].slug))
            .map(|(slug, output)| (slug.clone(), output.clone()))
            .collect();
        // Where no last step completed, there is no output at all.
        Fate::Completed(if output.is_empty() {
            Value::Null
        } else {
            Value::Object(output)
        })
    };
    let random = (u128::from(chance.next()) << 64) | u128::from(chance.next());
    Run {
        id: Uuid::from_u128(random),
        flow,
        seed,
        input,
        fate,
        tasks,
        outputs,
        skipped,
    }
}

// Working them ----------------------------------------------------------------------------------------------------------

type Key = (Uuid, String, i32);

struct World {
    url: String,
    api: PgflowApi,
    seed: u64,
    flows: Vec<Flow>,
    runs: HashMap<Uuid, Run>,
    /// Runs nobody has started yet.
    unstarted: Mutex<Vec<Uuid>>,
    /// Hand-outs that were committed.
    handed: Mutex<HashMap<Key, usize>>,
    /// Tasks whose worker died, to be put back by whoever comes by; true: that worker is only late.
    dead: Mutex<Vec<(Key, bool)>>,
    late: Mutex<Vec<Key>>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_flows_end_as_the_reference_says_whatever_becomes_of_their_workers() {
    random_flows_end_as_the_reference_says(PgflowApi::V0_7).await;
}

pub(crate) async fn random_flows_end_as_the_reference_says(api: PgflowApi) {
    let seed = seed();
    let dags = std::env::var("FLOWGATE_DAGS").map_or(DAGS, |text| text.parse().unwrap());
    let about = format!("FLOWGATE_SEED={seed} FLOWGATE_DAGS={dags}");
    eprintln!("{about}");

    let mut chance = Chance(seed);
    let flows: Vec<_> = (0..dags).map(|n| make_flow(&mut chance, n, api)).collect();
    let core = Core::at(api).await;
    for flow in &flows {
        core.run(&define(flow, &mut chance, api)).await;
    }
    let runs: Vec<_> = (0..flows.len() * 2)
        .map(|n| make_run(&mut chance, &flows, n % flows.len(), api))
        .collect();
    let world = Arc::new(World {
        url: core.db.primary_url.clone(),
        api,
        seed,
        flows,
        unstarted: Mutex::new(runs.iter().map(|run| run.id).collect()),
        runs: runs.into_iter().map(|run| (run.id, run)).collect(),
        handed: Mutex::default(),
        dead: Mutex::default(),
        late: Mutex::default(),
    });

    let workers: Vec<_> = (0..WORKERS)
        .map(|me| tokio::spawn(work(world.clone(), Chance(mix(&[seed, me])))))
        .collect();
    let all = timeout(PATIENCE, join_all(workers)).await;
    if let Ok(workers) = all {
        for worker in workers {
            worker.unwrap_or_else(|error| panic!("{about}: {error}"));
        }
    } else {
        let left = core
            .show("select run_id, step_slug, task_index, t.status, attempts_count from pgflow.step_tasks as t
                   join pgflow.runs as r using (run_id) where r.status = 'started' and t.status in ('queued', 'started')")
            .await;
        panic!("{about}: not done after {PATIENCE:?}:\n{left}");
    }

    core.run("create temp table abandoned (run_id uuid, step_slug text, task_index int)")
        .await;
    for run in world.runs.values() {
        for ((slug, index), task) in &run.tasks {
            if task.script == [Act::Abandon] {
                let id = run.id;
                core.run(&format!(
                    "insert into abandoned values ('{id}', '{slug}', {index})"
                ))
                .await;
            }
        }
    }
    invariants::hold(&core, &about).await;
    compare(&core, &world, &about).await;
}

/// A worker's life: several of them, as its connection dies now and then. Ends when nothing is left to do but what others
/// are doing just now; what follows from that is theirs.
async fn work(world: Arc<World>, mut chance: Chance) {
    let mut client = connect(&world.url).await;
    loop {
        let next = if chance.percent(60) {
            world.unstarted.lock().unwrap().pop()
        } else {
            None
        };
        if let Some(run) = next {
            start_run(&world, &mut client, run, &mut chance).await;
        }
        let dead = take_any(&world.dead, &mut chance);
        if let Some((task, late)) = dead {
            put_back(&client, &world, &task).await;
            if late {
                world.late.lock().unwrap().push(task);
            }
        }
        let late = if chance.percent(30) {
            take_any(&world.late, &mut chance)
        } else {
            None
        };
        if let Some(task) = late {
            show(&client, &complete(&world, &task)).await;
        }

        let queued = "select distinct t.flow_slug from pgflow.step_tasks as t join pgflow.runs as r using (run_id)
                      join pgflow.step_states as s using (run_id, step_slug)
                      where r.status = 'started' and s.status = 'started' and t.status = 'queued' order by 1";
        let flows = show(&client, queued).await;
        let flows: Vec<_> = flows.lines().collect();
        if !flows.is_empty() {
            let flow = flows[chance.below(flows.len() as u64) as usize];
            work_flow(&world, &mut client, flow, &mut chance).await;
        } else if world.unstarted.lock().unwrap().is_empty()
            && world.dead.lock().unwrap().is_empty()
            && world.late.lock().unwrap().is_empty()
        {
            return;
        }
    }
}

fn take_any<T>(from: &Mutex<Vec<T>>, chance: &mut Chance) -> Option<T> {
    let mut from = from.lock().unwrap();
    if from.is_empty() {
        return None;
    }
    let at = chance.below(from.len() as u64) as usize;
    Some(from.swap_remove(at))
}

async fn start_run(world: &World, client: &mut Client, id: Uuid, chance: &mut Chance) {
    let run = &world.runs[&id];
    let (flow, input) = (&world.flows[run.flow].slug, literal(&run.input));
    let start = if chance.percent(30) {
        format!(
            "select pgflow.start_flow_with_states('{flow}', {input}, '{id}') #>> '{{run,status}}'"
        )
    } else {
        format!("select status from pgflow.start_flow('{flow}', {input}, '{id}')")
    };
    if chance.percent(5) {
        // Begun and lost; somebody will start it again under the same id.
        show(client, "begin").await;
        show(client, &start).await;
        *client = connect(&world.url).await;
        world.unstarted.lock().unwrap().push(id);
        return;
    }
    let status = show(client, &start).await;
    let expected = match &run.fate {
        Fate::Completed(_) if run.tasks.is_empty() => "completed",
        // At once, or later.
        Fate::Failed(errors)
            if status == "failed"
                && errors
                    .values()
                    .flatten()
                    .any(|error| error == "Condition not met") =>
        {
            "failed"
        }
        Fate::Completed(_) | Fate::Failed(_) | Fate::Hangs => "started",
    };
    assert_eq!(status, expected, "{id}");
}

/// As a requeue does: queued again, visible at once, the attempt counted.
async fn put_back(client: &Client, world: &World, (run, slug, index): &Key) {
    let flow = &world.flows[world.runs[run].flow].slug;
    let sql = format!(
        "update pgflow.step_tasks set status = 'queued', started_at = null, last_worker_id = null
         where run_id = '{run}' and step_slug = '{slug}' and task_index = {index} and status = 'started' returning message_id"
    );
    let message = show(client, &sql).await;
    if !message.is_empty() {
        let visible = format!("select pgmq.set_vt('{flow}'::text, {message}::bigint, 0)");
        show(client, &visible).await;
    }
}

/// Reads and starts a few tasks of a flow, and acts on them.
async fn work_flow(world: &World, client: &mut Client, flow: &str, chance: &mut Chance) {
    // Visible again at once, so that others read the same messages: only start_tasks keeps them apart.
    let qty = 1 + chance.below(6);
    let read = if chance.percent(20) {
        let schema = match world.api {
            PgflowApi::V0_7 => "pgflow",
            PgflowApi::V0_14 => "pgmq",
        };
        format!("select msg_id from {schema}.read_with_poll('{flow}', 0, {qty}, 1, 5)")
    } else {
        format!("select msg_id from pgmq.read('{flow}', 0, {qty})")
    };
    let ids = show(client, &read).await.replace('\n', ",");
    let start = format!("select * from pgflow.start_tasks('{flow}', '{{{ids}}}', '{WORKER}')");
    if chance.percent(4) {
        // Started in a transaction that never commits: for everybody else nothing was started.
        show(client, "begin").await;
        show(client, &start).await;
        *client = connect(&world.url).await;
        return;
    }
    let tasks = client.query(&start, &[]).await.unwrap();
    let mut handed: Vec<(Key, Act)> = Vec::new();
    for row in &tasks {
        let task: Key = (
            row.get("run_id"),
            row.get("step_slug"),
            row.get("task_index"),
        );
        let run = &world.runs[&task.0];
        assert_eq!(row.get::<_, String>("flow_slug"), flow);
        let expected = run.tasks.get(&(task.1.clone(), task.2));
        let expected = expected.unwrap_or_else(|| panic!("{task:?} can never start"));
        let Json(input) = row.get::<_, Json<Value>>("input");
        assert_eq!(input, expected.input, "the input of {task:?}");
        if world.api == PgflowApi::V0_14 {
            let steps = &world.flows[run.flow].steps;
            let step = steps.iter().find(|step| step.slug == task.1).unwrap();
            let begins = step.deps.is_empty() && !step.is_map;
            let flow_input = row
                .get::<_, Option<Json<Value>>>("flow_input")
                .map(|Json(value)| value);
            assert_eq!(
                flow_input,
                begins.then(|| run.input.clone()),
                "the flow's input of {task:?}"
            );
        }

        let mut all = world.handed.lock().unwrap();
        let times = all.entry(task.clone()).or_default();
        let last = expected.script.len() - 1;
        handed.push((task, expected.script[(*times).min(last)]));
        *times += 1;
    }
    while !handed.is_empty() {
        let next = chance.below(handed.len() as u64) as usize;
        let (task, act) = handed.swap_remove(next);
        let (id, slug, index) = &task;
        let fail = |error: &str| {
            format!("select status from pgflow.fail_task('{id}', '{slug}', {index}, '{error}')")
        };
        match act {
            Act::Succeed => {
                show(client, &complete(world, &task)).await;
            }
            Act::Fail => {
                let status = show(client, &fail(&format!("{slug} {index} broke"))).await;
                assert_ne!(status, "", "{task:?}");
            }
            Act::Abandon => {}
            Act::Die(death) => {
                let call = match death {
                    Death::Silent | Death::Late => None,
                    Death::Completing => Some(complete(world, &task)),
                    Death::Failing => Some(fail("never said")),
                };
                if let Some(call) = call {
                    show(client, "begin").await;
                    show(client, &call).await;
                    // Its locks go when the server notices; the rest is done on a new connection.
                    *client = connect(&world.url).await;
                }
                world
                    .dead
                    .lock()
                    .unwrap()
                    .push((task, death == Death::Late));
            }
        }
    }
}

fn complete(world: &World, (id, slug, index): &Key) -> String {
    let run = &world.runs[id];
    let output = &run.tasks[&(slug.clone(), *index)].output;
    let output = if output.is_null() && mix(&[run.seed, *index as u64]).is_multiple_of(2) {
        "null".to_owned()
    } else {
        literal(output)
    };
    format!("select status from pgflow.complete_task('{id}', '{slug}', {index}, {output})")
}

fn literal(value: &Value) -> String {
    format!("'{}'::jsonb", value.to_string().replace('\'', "''"))
}

// What came of it -------------------------------------------------------------------------------------------------------

async fn compare(core: &Core, world: &World, about: &str) {
    let mut wrong = Vec::new();
    let mut fates: BTreeMap<&str, u32> = BTreeMap::new();

    let rows = core
        .client
        .query("select run_id, status, output from pgflow.runs", &[])
        .await
        .unwrap();
    assert_eq!(rows.len(), world.runs.len(), "{about}");
    let failures = core
        .client
        .query(
            "select run_id, step_slug, error_message from pgflow.step_states where status = 'failed'",
            &[],
        )
        .await
        .unwrap();
    let failures: HashMap<Uuid, (String, Option<String>)> = failures
        .iter()
        .map(|row| (row.get(0), (row.get(1), row.get(2))))
        .collect();
    for row in &rows {
        let (id, status): (Uuid, String) = (row.get(0), row.get(1));
        let output = row
            .get::<_, Option<Json<Value>>>(2)
            .map(|Json(value)| value);
        let fits = match (&world.runs[&id].fate, status.as_str()) {
            (Fate::Completed(expected), "completed") => output.unwrap_or_default() == *expected,
            (Fate::Failed(errors), "failed") => failures.get(&id).is_some_and(|(step, error)| {
                let words = error.as_deref().unwrap_or_default();
                errors
                    .get(step)
                    .is_some_and(|of_step| of_step.contains(words))
            }),
            (Fate::Hangs, "started") => true,
            _ => false,
        };
        let fate = &world.runs[&id].fate;
        if !fits {
            wrong.push(format!("run {id} is {status}, not {fate:?}"));
        }
        let kind = match fate {
            Fate::Completed(_) => "completed",
            Fate::Failed(errors)
                if errors
                    .values()
                    .flatten()
                    .any(|e| e.contains("TYPE_VIOLATION")) =>
            {
                "may violate a type"
            }
            Fate::Failed(_) => "failed",
            Fate::Hangs => "abandoned",
        };
        *fates.entry(kind).or_default() += 1;
    }

    // What was skipped, and why, in runs that came to their end.
    let states = core
        .client
        .query(
            "select run_id, step_slug, to_jsonb(s) ->> 'skip_reason' from pgflow.step_states as s join pgflow.runs as r using (run_id)
             where r.status = 'completed'",
            &[],
        )
        .await
        .unwrap();
    let mut skipped = 0;
    for row in &states {
        let (id, step, reason): (Uuid, String, Option<String>) =
            (row.get(0), row.get(1), row.get(2));
        let expected = world.runs[&id].skipped.get(&step).copied();
        if reason.as_deref() != expected {
            wrong.push(format!(
                "{id} {step}: skipped for {reason:?}, not {expected:?}"
            ));
        }
        skipped += usize::from(reason.is_some());
    }

    let rows = core
        .client
        .query(
            "select run_id, step_slug, task_index, status, attempts_count, output from pgflow.step_tasks",
            &[],
        )
        .await
        .unwrap();
    let mut handed = std::mem::take(&mut *world.handed.lock().unwrap());
    let (mut retried, attempts) = (0, handed.values().sum::<usize>());
    for row in &rows {
        let task: Key = (row.get(0), row.get(1), row.get(2));
        let (status, attempts): (String, i32) = (row.get(3), row.get(4));
        let output = row
            .get::<_, Option<Json<Value>>>(5)
            .map(|Json(value)| value);
        let run = &world.runs[&task.0];
        let Some(expected) = run.tasks.get(&(task.1.clone(), task.2)) else {
            wrong.push(format!("{task:?} should not be"));
            continue;
        };
        let times = handed.remove(&task).unwrap_or_default();
        if times != attempts as usize {
            wrong.push(format!(
                "{task:?}: attempt {attempts}, handed out {times} times"
            ));
        }
        retried += usize::from(times > 1);
        if status == "completed" && output.unwrap_or_default() != expected.output {
            wrong.push(format!("{task:?}: another output"));
        }
        if status == "completed" && expected.script.last() != Some(&Act::Succeed) {
            wrong.push(format!("{task:?}: completed against its script"));
        }
    }
    if !handed.is_empty() {
        wrong.push(format!("handed out without a row: {handed:?}"));
    }

    // Steps that completed gave what the reference gives, in runs of whatever end.
    let said = core
        .client
        .query(
            "select substr(topic, 12)::uuid, payload ->> 'step_slug', payload -> 'output' from flowgate.event
             where event like 'step:%:completed'",
            &[],
        )
        .await
        .unwrap();
    for row in &said {
        let (id, step): (Uuid, String) = (row.get(0), row.get(1));
        let Json(output) = row.get::<_, Json<Value>>(2);
        if world.runs[&id].outputs.get(&step) != Some(&output) {
            wrong.push(format!("{id} {step}: completed with another output"));
        }
    }

    eprintln!(
        "{about}: {fates:?}, {} tasks of {attempts} attempts, {retried} started more than once, {} step outputs, {skipped} steps skipped",
        rows.len(),
        said.len()
    );
    assert!(wrong.is_empty(), "{about}:\n{}", wrong.join("\n"));
    // The default run must meet everything it is there for.
    if world.seed == SEED && world.flows.len() as u64 >= DAGS {
        let kinds: Vec<_> = fates.keys().copied().collect();
        assert_eq!(
            kinds,
            ["abandoned", "completed", "failed", "may violate a type"]
        );
        assert!(retried > 50, "{retried}");
        assert!(world.api == PgflowApi::V0_7 || skipped > 50, "{skipped}");
    }
}
