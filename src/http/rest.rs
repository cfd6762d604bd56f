//! `/rest/v1`: as much of PostgREST as pgflow's client and its users' own pages need, with its words for what is refused. Two
//! things: calls of a few of pgflow's functions, and reading its tables by simple filters. Grants and policies decide, as in SQL.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::Response;
use futures_util::StreamExt;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

use super::HttpState;
use super::identity::{Identity, of_headers};
use super::refusal::{Refusal, json_text};
use super::starting::Hold;
use crate::pgflow::ids::run_id;
use crate::pgflow::tables::TABLES;
use crate::server::questions::{Access, Question};
use crate::wire::quote::{ident, literal};

const SCHEMA: &str = "pgflow";
const OBJECT: &str = "application/vnd.pgrst.object+json";
/// Rows of one answer.
const ROWS_MAX: i64 = 1_000;

/// What may be called: a name, its arguments, and whether it gives rows.
struct Function {
    name: &'static str,
    arguments: &'static [Argument],
    rows: bool,
}

struct Argument {
    name: &'static str,
    kind: &'static str,
    required: bool,
}

const fn argument(name: &'static str, kind: &'static str, required: bool) -> Argument {
    Argument {
        name,
        kind,
        required,
    }
}

const STARTING: &[Argument] = &[
    argument("flow_slug", "text", true),
    argument("input", "jsonb", true),
    argument("run_id", "uuid", false),
];

const FUNCTIONS: &[Function] = &[
    Function {
        name: "start_flow_with_states",
        arguments: STARTING,
        rows: false,
    },
    Function {
        name: "start_flow",
        arguments: STARTING,
        rows: true,
    },
    Function {
        name: "get_run_with_states",
        arguments: &[argument("run_id", "uuid", true)],
        rows: false,
    },
];

pub(super) async fn unknown(method: Method, uri: Uri) -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "PGRST125",
        format!(
            "Invalid path specified in request URL: {method} {}",
            uri.path()
        ),
    )
}

/// `POST /rest/v1/rpc/{function}`
pub(super) async fn call(
    State(state): State<HttpState>,
    Path(name): Path<String>,
    method: Method,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let identity = state.guard.identify(of_headers(&headers)).await?;
    schema_named(&headers, "content-profile")?;
    json_sent(&headers)?;
    let arguments: BTreeMap<String, Box<RawValue>> = if body.is_empty() {
        BTreeMap::new()
    } else {
        serde_json::from_slice(&body)
            .map_err(|_malformed| Refusal::bad_request("PGRST102", "Empty or invalid json"))?
    };
    let function = FUNCTIONS.iter().find(|function| {
        let known = |name: &String| {
            let mut of = function.arguments.iter();
            of.any(|argument| argument.name == name)
        };
        let mut needed = function
            .arguments
            .iter()
            .filter(|argument| argument.required);
        function.name == name
            && arguments.keys().all(known)
            && needed.all(|argument| arguments.contains_key(argument.name))
    });
    let Some(function) = function else {
        return Err(no_function(&name, arguments.keys()));
    };
    let sql = call_sql(function, &arguments)?;
    let started = arguments
        .get("run_id")
        .filter(|_| function.arguments.len() == STARTING.len())
        .and_then(|id| run_id(serde_json::from_str::<&str>(id.get()).ok()?));
    let hold = started.map(|run| state.starting.hold(run));
    let path = format!("/rpc/{name}");
    let answer = asked(
        &state,
        &identity,
        &method,
        &path,
        &headers,
        Access::Write,
        &sql,
    )
    .await?;
    let text = answer
        .into_iter()
        .next()
        .flatten()
        .unwrap_or_else(|| "null".to_owned());
    let response = json_text(text);
    Ok(match hold {
        Some(hold) => until_written(response, hold),
        None => response,
    })
}

/// The run's events wait until this answer is on its way: one that overtakes it is undone by it in the client.
fn until_written(response: Response, hold: Hold) -> Response {
    let (parts, body) = response.into_parts();
    let body = futures_util::stream::unfold((Some(body), hold), |(body, hold)| async move {
        let bytes = axum::body::to_bytes(body?, usize::MAX).await;
        Some((bytes, (None, hold)))
    });
    // Whoever compresses it asks once more after its end.
    Response::from_parts(parts, Body::from_stream(body.fuse()))
}

fn call_sql(
    function: &Function,
    arguments: &BTreeMap<String, Box<RawValue>>,
) -> Result<String, Refusal> {
    let mut given = Vec::new();
    for argument in function.arguments {
        let Some(value) = arguments.get(argument.name) else {
            continue;
        };
        let value = match argument.kind {
            "jsonb" => literal(value.get()),
            _ => match serde_json::from_str::<Value>(value.get()) {
                Ok(Value::Null) => "null".to_owned(),
                Ok(Value::String(text)) => quoted(&text)?,
                _ => quoted(value.get())?,
            },
        };
        given.push(format!("{} => {value}::{}", argument.name, argument.kind));
    }
    let call = format!("{SCHEMA}.{}({})", function.name, given.join(", "));
    Ok(if function.rows {
        format!("select coalesce(jsonb_agg(to_jsonb(x)), '[]')::text from {call} as x")
    } else {
        format!("select {call}::text")
    })
}

fn no_function<'a>(name: &str, given: impl Iterator<Item = &'a String>) -> Refusal {
    let given: Vec<&str> = given.map(String::as_str).collect();
    let given = given.join(", ");
    let mut refusal = Refusal::new(
        StatusCode::NOT_FOUND,
        "PGRST202",
        format!("Could not find the function {SCHEMA}.{name}({given}) in the schema cache"),
    );
    let known: Vec<&str> = FUNCTIONS.iter().map(|function| function.name).collect();
    refusal.hint = Some(format!("What may be called here: {}.", known.join(", ")));
    refusal
}

/// `GET /rest/v1/{table}`
pub(super) async fn read(
    State(state): State<HttpState>,
    Path(table): Path<String>,
    method: Method,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let identity = state.guard.identify(of_headers(&headers)).await?;
    schema_named(&headers, "accept-profile")?;
    if !TABLES.iter().any(|known| known.name == table) {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "PGRST205",
            format!("Could not find the table '{SCHEMA}.{table}' in the schema cache"),
        ));
    }
    let sql = read_sql(&table, &query.unwrap_or_default())?;
    let path = format!("/{table}");
    let rows = asked(
        &state,
        &identity,
        &method,
        &path,
        &headers,
        Access::Read,
        &sql,
    )
    .await?;
    let rows: Vec<&str> = rows.iter().flatten().map(String::as_str).collect();
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok());
    if !accept.is_some_and(|accept| accept.contains(OBJECT)) {
        return Ok(json_text(format!("[{}]", rows.join(", "))));
    }
    if let [row] = rows.as_slice() {
        let mut response = json_text((*row).to_owned());
        let kind =
            header::HeaderValue::from_static("application/vnd.pgrst.object+json; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        return Ok(response);
    }
    let mut refusal = Refusal::new(
        StatusCode::NOT_ACCEPTABLE,
        "PGRST116",
        "Cannot coerce the result to a single JSON object",
    );
    refusal.details = Some(format!("The result contains {} rows", rows.len()));
    Err(refusal)
}

pub(super) fn read_sql(table: &str, query: &str) -> Result<String, Refusal> {
    let mut columns = "to_jsonb(x)::text".to_owned();
    let (mut filters, mut order) = (String::new(), String::new());
    let (mut limit, mut offset) = (ROWS_MAX, 0);
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match name.as_ref() {
            // For those who can't set headers; not for tables.
            "apikey" => {}
            "columns" => {}
            "select" => columns = selected(&value)?,
            "order" => order = ordered(&value)?,
            "limit" => limit = count(&value)?.min(ROWS_MAX),
            "offset" => offset = count(&value)?,
            _ => {
                filters += if filters.is_empty() {
                    " where "
                } else {
                    " and "
                };
                filters += &filter(&name, &value)?;
            }
        }
    }
    Ok(format!(
        "select {columns} from {SCHEMA}.{} as x{filters}{order} limit {limit} offset {offset}",
        ident(table)
    ))
}

fn selected(value: &str) -> Result<String, Refusal> {
    if value.trim() == "*" || value.trim().is_empty() {
        return Ok("to_jsonb(x)::text".to_owned());
    }
    let mut pairs = Vec::new();
    for name in value.split(',') {
        let name = column(name.trim())?;
        pairs.push(format!("{}, x.{}", literal(name), ident(name)));
    }
    Ok(format!("jsonb_build_object({})::text", pairs.join(", ")))
}

fn ordered(value: &str) -> Result<String, Refusal> {
    let mut keys = Vec::new();
    for key in value.split(',').filter(|key| !key.trim().is_empty()) {
        let mut words = key.trim().split('.');
        let mut sql = format!("x.{}", ident(column(words.next().unwrap_or_default())?));
        for word in words {
            sql += match word {
                "asc" => " asc",
                "desc" => " desc",
                "nullsfirst" => " nulls first",
                "nullslast" => " nulls last",
                _ => return Err(unparsed("order", value)),
            };
        }
        keys.push(sql);
    }
    Ok(if keys.is_empty() {
        String::new()
    } else {
        format!(" order by {}", keys.join(", "))
    })
}

fn filter(name: &str, value: &str) -> Result<String, Refusal> {
    let unparsed = || unparsed(name, value);
    let (negated, value) = match value.strip_prefix("not.") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let (operator, operand) = value.split_once('.').ok_or_else(unparsed)?;
    let left = format!("x.{}", ident(column(name)?));
    let comparison = match operator {
        "eq" => "=",
        "neq" => "<>",
        "gt" => ">",
        "gte" => ">=",
        "lt" => "<",
        "lte" => "<=",
        "is" => "is",
        "in" => "in",
        _ => return Err(unparsed()),
    };
    let right = match operator {
        "is" => match operand.to_ascii_lowercase().as_str() {
            word @ ("null" | "true" | "false" | "unknown") => word.to_owned(),
            "not_null" => "not null".to_owned(),
            _ => return Err(unparsed()),
        },
        "in" => {
            let inner = operand
                .strip_prefix('(')
                .and_then(|rest| rest.strip_suffix(')'));
            let mut items = Vec::new();
            for item in list(inner.ok_or_else(unparsed)?).ok_or_else(unparsed)? {
                items.push(quoted(&item)?);
            }
            if items.is_empty() {
                return Ok(if negated { "true" } else { "false" }.to_owned());
            }
            format!("({})", items.join(", "))
        }
        _ => quoted(operand)?,
    };
    let sql = format!("{left} {comparison} {right}");
    Ok(if negated { format!("not ({sql})") } else { sql })
}

/// `a,"b,\"c",d`
fn list(text: &str) -> Option<Vec<String>> {
    let mut items = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('"') {
            let mut item = String::new();
            let mut characters = inner.char_indices();
            loop {
                match characters.next()? {
                    (_, '\\') => item.push(characters.next()?.1),
                    (at, '"') => {
                        rest = &inner[at + 1..];
                        break;
                    }
                    (_, other) => item.push(other),
                }
            }
            items.push(item);
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            items.push(rest[..end].to_owned());
            rest = &rest[end..];
        }
        match rest.strip_prefix(',') {
            Some("") => {
                items.push(String::new());
                rest = "";
            }
            Some(more) => rest = more,
            None if rest.is_empty() => {}
            None => return None,
        }
    }
    Some(items)
}

/// Whether there is such a column, Postgres says.
fn column(name: &str) -> Result<&str, Refusal> {
    let plain = !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if plain {
        Ok(name)
    } else {
        Err(unparsed("column", name))
    }
}

fn count(value: &str) -> Result<i64, Refusal> {
    let count = value.parse().ok().filter(|count| *count >= 0);
    count.ok_or_else(|| unparsed("count", value))
}

fn quoted(value: &str) -> Result<String, Refusal> {
    if value.contains('\0') {
        return Err(unparsed("value", "with a NUL"));
    }
    Ok(literal(value))
}

fn unparsed(what: &str, value: &str) -> Refusal {
    let mut shown: String = value.chars().take(100).collect();
    shown = shown.replace('"', "'");
    Refusal::bad_request("PGRST100", format!("failed to parse {what} ({shown})"))
}

fn schema_named(headers: &HeaderMap, header: &str) -> Result<(), Refusal> {
    let named = headers.get(header).map(|name| name.as_bytes());
    match named {
        None => Ok(()),
        Some(name) if name == SCHEMA.as_bytes() => Ok(()),
        Some(_) => Err(Refusal::new(
            StatusCode::NOT_ACCEPTABLE,
            "PGRST106",
            format!("The schema must be one of the following: {SCHEMA}"),
        )),
    }
}

/// A page of any origin may post text without asking first; JSON it may not.
fn json_sent(headers: &HeaderMap) -> Result<(), Refusal> {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(Refusal::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "PGRST102",
        format!("Content-Type not acceptable: {kind}"),
    ))
}

/// The first column of each row.
async fn asked(
    state: &HttpState,
    identity: &Arc<Identity>,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    access: Access,
    sql: &str,
) -> Result<Vec<Option<String>>, Refusal> {
    let mut shown = Map::new();
    for (name, value) in headers {
        if let Ok(value) = value.to_str() {
            shown.insert(name.as_str().to_owned(), value.into());
        }
    }
    let cookies: Map<String, Value> = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|cookies| cookies.to_str().ok())
        .flat_map(|cookies| cookies.split(';'))
        .filter_map(|cookie| cookie.trim().split_once('='))
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect();
    let (shown, cookies) = (
        Value::Object(shown).to_string(),
        Value::Object(cookies).to_string(),
    );
    let question = Question {
        asker: Some(&identity.asker),
        before: "",
        settings: &[
            ("request.method", method.as_str()),
            ("request.path", path),
            ("request.headers", &shown),
            ("request.cookies", &cookies),
        ],
        access,
        sql,
    };
    let answer = state.database.ask(&question).await;
    let answer = answer.map_err(|error| Refusal::of_database(error, Some(identity)))?;
    let first = |row: Vec<Option<String>>| row.into_iter().next().flatten();
    Ok(answer.rows.into_iter().map(first).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(query: &str, expected: &str) {
        let got = match read_sql("steps", query) {
            Ok(sql) => sql,
            Err(refused) => format!("{} {}", refused.code, refused.message),
        };
        assert_eq!(got, expected);
    }

    #[test]
    fn a_query_is_filters_order_and_bounds_and_never_more_sql() {
        let all = "select to_jsonb(x)::text from pgflow.\"steps\" as x";
        check("", &format!("{all} limit 1000 offset 0"));
        check(
            "select=*&flow_slug=eq.f&order=step_index.asc",
            &format!(
                "{all} where x.\"flow_slug\" = 'f' order by x.\"step_index\" asc limit 1000 offset 0"
            ),
        );
        check(
            "a=neq.1&b=gte.2020-01-01T00%3A00%3A00Z&c=is.null&d=not.in.(x,%22y,%5C%22z%22)&limit=5&offset=2",
            &format!(
                "{all} where x.\"a\" <> '1' and x.\"b\" >= '2020-01-01T00:00:00Z' and x.\"c\" is null \
                 and not (x.\"d\" in ('x', 'y,\"z')) limit 5 offset 2"
            ),
        );
        check(
            "a=eq.'%20or%20true--&limit=100000",
            &format!("{all} where x.\"a\" = ''' or true--' limit 1000 offset 0"),
        );
        check(
            "select=a,b",
            "select jsonb_build_object('a', x.\"a\", 'b', x.\"b\")::text from pgflow.\"steps\" as x limit 1000 offset 0",
        );
        check("a=in.()", &format!("{all} where false limit 1000 offset 0"));
        for (query, what) in [
            ("a=1", "a (1)"),
            ("a=like.x", "a (like.x)"),
            ("a%22b=eq.1", "column (a'b)"),
            ("select=a(b)", "column (a(b))"),
            ("order=a.sideways", "order (a.sideways)"),
            ("limit=-1", "count (-1)"),
            ("a=in.x", "a (in.x)"),
            ("a=in.(%22x)", "a (in.('x))"),
            ("a=is.maybe", "a (is.maybe)"),
            ("a=eq.%00", "value (with a NUL)"),
        ] {
            check(query, &format!("PGRST100 failed to parse {what}"));
        }
    }

    #[test]
    fn a_call_names_its_arguments_and_keeps_json_as_it_came() {
        let sent = r#"{"flow_slug":"it's","input":{"n": 1.00, "s":"\u0027"}}"#;
        let arguments = serde_json::from_str(sent).unwrap();
        assert_eq!(
            call_sql(&FUNCTIONS[0], &arguments).unwrap(),
            "select pgflow.start_flow_with_states(flow_slug => 'it''s'::text, \
             input =>  E'{\"n\": 1.00, \"s\":\"\\\\u0027\"}'::jsonb)::text"
        );
    }
}
