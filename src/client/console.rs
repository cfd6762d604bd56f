//! The admin console: database `flowgate` of the proxy's own port. `SHOW …` in PgBouncer's manner, by simple Query; what is
//! not there yet says so. Reads counters and books, changes nothing.

use super::error::SessionError;
use super::shared::Shared;
use crate::upstream::Role;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::{self, Header};
use crate::wire::messages::{
    TxStatus, put_command_complete, put_empty, put_parameter_status, put_ready, put_text_columns,
    put_text_row, query_text,
};
use crate::wire::stream::Stream;

/// The longest command.
const FRAME_MAX: usize = 64 * 1024;
const COMMANDS: &str = "SHOW VERSION, ROUTES, POOLS, REPLICAS, PINS, MEMO, HELP";

/// What follows AuthenticationOk.
pub(super) fn put_greeting(out: &mut Vec<u8>) {
    let version = concat!(env!("CARGO_PKG_VERSION"), "/flowgate");
    let parameters = [
        ("server_version", version),
        ("client_encoding", "UTF8"),
        ("server_encoding", "UTF8"),
        ("DateStyle", "ISO, MDY"),
        ("TimeZone", "UTC"),
        ("standard_conforming_strings", "on"),
        ("integer_datetimes", "on"),
    ];
    for (name, value) in parameters {
        put_parameter_status(out, name, value);
    }
    put_ready(out, TxStatus::Idle);
}

/// Answers commands until the client leaves.
pub(super) async fn serve(client: &mut Stream, shared: &Shared) -> Result<(), SessionError> {
    let mut skip_to_sync = false;
    loop {
        let header: Header = match client.next_frame(FRAME_MAX).await {
            Ok(header) => header,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let body = frame::body(client.input.bytes(), header).unwrap_or_default();
        let mut out = Vec::new();
        match header.tag {
            b'Q' => {
                let text = query_text(body)
                    .map(|text| String::from_utf8_lossy(text).into_owned())
                    .unwrap_or_default();
                answer(&mut out, &text, shared);
                put_ready(&mut out, TxStatus::Idle);
            }
            b'S' => {
                skip_to_sync = false;
                put_ready(&mut out, TxStatus::Idle);
            }
            b'X' => return Ok(()),
            _ if skip_to_sync => {}
            _ => {
                skip_to_sync = true;
                let error = ErrorResponse::error(
                    "0A000",
                    "the admin console speaks the simple query protocol only",
                );
                error.put(&mut out);
            }
        }
        client.input.consume(header.whole);
        client.output.extend_from_slice(&out);
        client.flush().await?;
    }
}

fn answer(out: &mut Vec<u8>, text: &str, shared: &Shared) {
    let command = text
        .trim()
        .trim_end_matches(';')
        .trim()
        .to_ascii_uppercase();
    let words: Vec<&str> = command.split_whitespace().collect();
    match words.as_slice() {
        [] => put_empty(out, b'I'),
        ["SHOW", "VERSION"] => {
            let version = concat!("Flowgate ", env!("CARGO_PKG_VERSION"));
            put_table(out, &["version"], [vec![version.to_owned()]]);
        }
        ["SHOW", "HELP"] => put_table(out, &["commands"], [vec![COMMANDS.to_owned()]]),
        ["SHOW", "ROUTES"] => {
            let counters = &shared.counters;
            let rows = [
                ("primary", counters.to_primary.get()),
                ("replica", counters.to_replica.get()),
                ("flowgate", counters.answered_here.get()),
                (
                    "read kept on primary: no replica was fresh enough",
                    counters.replica_not_fresh.get(),
                ),
                (
                    "read kept on primary: the replica refused it",
                    counters.replica_refused.get(),
                ),
            ];
            put_table(
                out,
                &["destination", "requests"],
                rows.map(|(to, count)| vec![to.to_owned(), count.to_string()]),
            );
        }
        ["SHOW", "POOLS"] => {
            let rows =
                shared
                    .pools
                    .report()
                    .into_iter()
                    .map(|(database, user, upstream, counts)| {
                        let active = counts.open - counts.idle;
                        let numbers = [active, counts.idle, counts.open, counts.waiting]
                            .map(|number| number.to_string());
                        [vec![database, user, upstream.to_string()], numbers.to_vec()].concat()
                    });
            let columns = [
                "database",
                "user",
                "upstream",
                "sv_active",
                "sv_idle",
                "sv_open",
                "cl_waiting",
            ];
            put_table(out, &columns, rows);
        }
        ["SHOW", "REPLICAS"] => {
            let replicas = shared
                .upstreams
                .iter()
                .filter(|upstream| upstream.role == Role::Replica);
            let rows = replicas.map(|replica| {
                let healthy = if replica.is_healthy() { "yes" } else { "no" };
                let lsn = replica.lsn();
                let lsn = format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff);
                vec![
                    replica.name.clone(),
                    healthy.to_owned(),
                    lsn,
                    replica.lag_bytes().to_string(),
                ]
            });
            put_table(
                out,
                &["replica", "in_rotation", "replayed", "lag_bytes"],
                rows,
            );
        }
        ["SHOW", "MEMO"] => {
            let stats = shared.classifier.memo_stats();
            let rows = [
                ("hits", stats.hits),
                ("misses", stats.misses),
                ("evictions", stats.evictions),
                ("too_large", stats.too_large),
                ("entries", stats.entries as u64),
                ("bytes", stats.bytes as u64),
            ];
            put_table(
                out,
                &["statement_texts", "count"],
                rows.map(|(name, count)| vec![name.to_owned(), count.to_string()]),
            );
        }
        ["SHOW", "PINS"] => {
            let rows = shared
                .counters
                .pins()
                .map(|(reason, count)| vec![reason.to_owned(), count.to_string()]);
            put_table(out, &["reason", "pins"], rows);
        }
        // What drivers send on connecting.
        ["SET", ..] => put_command_complete(out, "SET"),
        _ => {
            let error = ErrorResponse::error("42601", format!("unknown command {:?}", text.trim()));
            error
                .with_hint(format!("The console knows {COMMANDS}."))
                .put(out);
        }
    }
}

fn put_table(out: &mut Vec<u8>, columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    put_text_columns(out, columns);
    for row in rows {
        let values: Vec<_> = row.iter().map(|value| Some(value.as_str())).collect();
        put_text_row(out, &values);
    }
    put_command_complete(out, "SHOW");
}
