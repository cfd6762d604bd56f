//! JSON for whoever looks: `/runs`, `/runs/{id}`, `/flows`, `/flows/{slug}`. Every answer is what the asking role may SELECT, in
//! one snapshot; nothing is kept. The state of a run is also what a stream begins with (`streams.rs`).

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use uuid::Uuid;

use super::HttpState;
use super::identity::{Credentials, Identity, of_headers};
use super::refusal::{Refusal, json_text};
use crate::events::Rights;
use crate::pgflow::events::run_topic;
use crate::pgflow::ids::{Slug, run_id};
use crate::server::questions::{Access, Answer, DbError, Question};
use crate::wire::quote::literal;

const RUNS: i64 = 50;
const RUNS_MAX: i64 = 500;

/// Credentials of those who can't set headers (EventSource, a link).
#[derive(Default, Deserialize)]
pub(super) struct InUrl {
    pub(super) apikey: Option<String>,
    pub(super) access_token: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RunsWanted {
    flow: Option<String>,
    status: Option<String>,
    limit: Option<String>,
    before: Option<String>,
}

pub(super) async fn identify(
    state: &HttpState,
    headers: &HeaderMap,
    url: &InUrl,
) -> Result<std::sync::Arc<Identity>, Refusal> {
    let sent = of_headers(headers);
    let credentials = Credentials {
        token: sent.token.or(url.access_token.as_deref()),
        key: sent.key.or(url.apikey.as_deref()),
    };
    Ok(state.guard.identify(credentials).await?)
}

pub(super) fn a_run_id(text: &str) -> Result<Uuid, Refusal> {
    run_id(text).ok_or_else(|| {
        Refusal::bad_request(
            "22P02",
            format!("invalid input syntax for type uuid: \"{text}\""),
        )
    })
}

pub(super) fn a_slug(text: &str) -> Result<Slug, Refusal> {
    Slug::parse(text)
        .ok_or_else(|| Refusal::bad_request("22023", format!("\"{text}\" is no flow's slug")))
}

pub(super) async fn runs(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
    Query(wanted): Query<RunsWanted>,
) -> Result<Response, Refusal> {
    let identity = identify(&state, &headers, &url).await?;
    let limit = match wanted.limit.as_deref().map(str::parse::<i64>) {
        None => RUNS,
        Some(Ok(limit)) if (1..=RUNS_MAX).contains(&limit) => limit,
        Some(_) => {
            let words = format!("limit: from 1 to {RUNS_MAX}");
            return Err(Refusal::bad_request("22023", words));
        }
    };
    let mut filter = String::from("true");
    if let Some(flow) = wanted.flow.as_deref().filter(|flow| !flow.is_empty()) {
        filter += &format!(" and r.flow_slug = '{}'", a_slug(flow)?);
    }
    match wanted.status.as_deref() {
        None | Some("") => {}
        Some(status @ ("started" | "completed" | "failed")) => {
            filter += &format!(" and r.status = '{status}'");
        }
        Some(_) => {
            let words = "status: started, completed or failed";
            return Err(Refusal::bad_request("22023", words));
        }
    }
    if let Some(before) = wanted.before.as_deref().filter(|before| !before.is_empty()) {
        let malformed = || Refusal::bad_request("22023", "before: not the `next` of a list");
        let (at, id) = before.split_once('_').ok_or_else(malformed)?;
        let plain = at
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b"-:.TZ".contains(&byte));
        let id = run_id(id).filter(|_| plain).ok_or_else(malformed)?;
        filter += &format!(
            " and (r.started_at, r.run_id) < ({}::timestamptz, '{id}'::uuid)",
            literal(at)
        );
    }
    let sql = format!(
        "select jsonb_build_object('run_id', r.run_id, 'flow_slug', r.flow_slug, 'status', r.status, \
         'remaining_steps', r.remaining_steps, 'started_at', r.started_at, 'completed_at', r.completed_at, \
         'failed_at', r.failed_at)::text, \
         to_char(r.started_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') || '_' || r.run_id \
         from pgflow.runs as r where {filter} order by r.started_at desc, r.run_id desc limit {}",
        limit + 1
    );
    let rows = ask(&state, &identity, "", &sql).await?.rows;
    let limit = usize::try_from(limit).unwrap_or(rows.len());
    let next = match rows.get(limit.saturating_sub(1)) {
        Some(last) if rows.len() > limit => last.get(1).cloned().flatten(),
        Some(_) | None => None,
    };
    let shown: Vec<&str> = rows
        .iter()
        .take(limit)
        .filter_map(|row| row.first()?.as_deref())
        .collect();
    let next = next.map_or_else(|| "null".to_owned(), |next| format!("\"{next}\""));
    Ok(json_text(format!(
        "{{\"runs\":[{}],\"next\":{next}}}",
        shown.join(",")
    )))
}

pub(super) async fn run(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let identity = identify(&state, &headers, &url).await?;
    let id = a_run_id(&id)?;
    let shown = run_state(&state, &identity, id).await?;
    shown
        .map(|shown| json_text(shown.json))
        .ok_or_else(Refusal::no_such_run)
}

/// A run as it is, and the last event that it has in it.
pub(super) struct RunState {
    pub(super) json: String,
    pub(super) seq: i64,
}

/// `None`: there is none that the role may see.
pub(super) async fn run_state(
    state: &HttpState,
    identity: &Identity,
    id: Uuid,
) -> Result<Option<RunState>, Refusal> {
    let failed = |error| Refusal::of_database(error, Some(identity));
    let rights = state.sight.rights(&identity.asker).await.map_err(failed)?;
    let Some(sql) = run_sql(&rights, id) else {
        return Ok(None);
    };
    let before = format!("{} as flowgate_before", last_seq(id));
    let answer = ask(state, identity, &before, &sql).await?;
    let seq = answer
        .before
        .as_deref()
        .and_then(|seq| seq.parse().ok())
        .unwrap_or(0);
    let Some(json) = answer.single() else {
        return Ok(None);
    };
    let body = json.strip_suffix('}').unwrap_or(&json);
    let json = format!("{body}, \"seq\": {seq}}}");
    Ok(Some(RunState { json, seq }))
}

/// For the control role, in the snapshot of what follows it.
pub(super) fn last_seq(id: Uuid) -> String {
    let topic = literal(&run_topic(id));
    format!("select coalesce((select t.seq from flowgate.topic as t where t.topic = {topic}), 0)")
}

fn run_sql(rights: &Rights, id: Uuid) -> Option<String> {
    let or_nothing = |table: &str, sql: String| {
        if rights.may_select(table) {
            sql
        } else {
            "'[]'::jsonb".to_owned()
        }
    };
    let base = if rights.by_id {
        format!("select pgflow.get_run_with_states('{id}'::uuid) as j")
    } else if rights.may_select("runs") {
        let states = or_nothing(
            "step_states",
            format!(
                "(select coalesce(jsonb_agg(to_jsonb(s)), '[]') from pgflow.step_states as s where s.run_id = '{id}')"
            ),
        );
        format!(
            "select jsonb_build_object('run', to_jsonb(r), 'steps', {states}) as j \
             from pgflow.runs as r where r.run_id = '{id}'"
        )
    } else {
        return None;
    };
    let steps = if rights.may_select("steps") {
        "(select coalesce(jsonb_agg(s.j || jsonb_build_object('step_index', d.step_index, 'step_type', d.step_type) \
         order by d.step_index), '[]') from jsonb_array_elements(base.j -> 'steps') as s(j) left join pgflow.steps as d \
         on d.flow_slug = base.j -> 'run' ->> 'flow_slug' and d.step_slug = s.j ->> 'step_slug')"
    } else {
        "base.j -> 'steps'"
    };
    let tasks = or_nothing(
        "step_tasks",
        format!(
            "(select coalesce(jsonb_agg(jsonb_build_object('step_slug', t.step_slug, 'task_index', t.task_index, \
             'status', t.status, 'attempts_count', t.attempts_count, 'error_message', t.error_message, \
             'queued_at', t.queued_at, 'started_at', t.started_at, 'completed_at', t.completed_at, \
             'failed_at', t.failed_at, 'last_worker_id', to_jsonb(t) -> 'last_worker_id', 'output', t.output) \
             order by t.step_slug, t.task_index), '[]') from pgflow.step_tasks as t where t.run_id = '{id}')"
        ),
    );
    let deps = or_nothing(
        "deps",
        "(select coalesce(jsonb_agg(jsonb_build_object('step_slug', d.step_slug, 'dep_slug', d.dep_slug) \
         order by d.step_slug, d.dep_slug), '[]') from pgflow.deps as d where d.flow_slug = base.j -> 'run' ->> 'flow_slug')"
            .to_owned(),
    );
    Some(format!(
        "with base as materialized ({base}) select jsonb_build_object('run', base.j -> 'run', 'steps', {steps}, \
         'tasks', {tasks}, 'deps', {deps})::text from base where base.j is not null"
    ))
}

/// How many runs a role may see of each flow, where it may see any.
fn counts(rights: &Rights, of: &str) -> String {
    if rights.may_select("runs") {
        format!(
            "(select coalesce(jsonb_object_agg(c.status, c.count), '{{}}') from (select r.status, count(*) as count \
             from pgflow.runs as r where r.flow_slug = {of} group by r.status) as c)"
        )
    } else {
        "null::jsonb".to_owned()
    }
}

pub(super) async fn flows(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
) -> Result<Response, Refusal> {
    let identity = identify(&state, &headers, &url).await?;
    let rights = rights(&state, &identity).await?;
    let counts = counts(&rights, "f.flow_slug");
    let sql = format!(
        "select coalesce(jsonb_agg(to_jsonb(f) || jsonb_build_object('runs', {counts}) order by f.flow_slug), '[]')::text \
         from pgflow.flows as f"
    );
    let flows = ask(&state, &identity, "", &sql).await?.single();
    let flows = flows.unwrap_or_else(|| "[]".to_owned());
    Ok(json_text(format!("{{\"flows\":{flows}}}")))
}

pub(super) async fn flow(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
    Path(slug): Path<String>,
) -> Result<Response, Refusal> {
    let identity = identify(&state, &headers, &url).await?;
    let slug = a_slug(&slug)?;
    let rights = rights(&state, &identity).await?;
    let all_of = |table: &str, order: &str| {
        if rights.may_select(table) {
            format!(
                "(select coalesce(jsonb_agg(to_jsonb(x) order by {order}), '[]') from pgflow.{table} as x \
                 where x.flow_slug = '{slug}')"
            )
        } else {
            "'[]'::jsonb".to_owned()
        }
    };
    let sql = format!(
        "select jsonb_build_object('flow', to_jsonb(f) || jsonb_build_object('runs', {}), 'steps', {}, 'deps', {})::text \
         from pgflow.flows as f where f.flow_slug = '{slug}'",
        counts(&rights, "f.flow_slug"),
        all_of("steps", "x.step_index"),
        all_of("deps", "x.step_slug, x.dep_slug"),
    );
    let flow = ask(&state, &identity, "", &sql).await?.single();
    flow.map(json_text)
        .ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "P0002", "no such flow"))
}

async fn rights(state: &HttpState, identity: &Identity) -> Result<std::sync::Arc<Rights>, Refusal> {
    let rights = state.sight.rights(&identity.asker).await;
    rights.map_err(|error| Refusal::of_database(error, Some(identity)))
}

async fn ask(
    state: &HttpState,
    identity: &Identity,
    before: &str,
    sql: &str,
) -> Result<Answer, Refusal> {
    let question = Question {
        asker: Some(&identity.asker),
        before,
        settings: &[],
        access: Access::Read,
        sql,
    };
    let asked: Result<Answer, DbError> = state.database.ask(&question).await;
    asked.map_err(|error| Refusal::of_database(error, Some(identity)))
}
