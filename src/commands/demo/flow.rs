//! The demo's flow: its steps as pgflow knows them, and which work each does. Never touches a socket of its own. Defined
//! by `mod`, executed by `worker`.

use std::path::Path;

use serde_json::{Value, json};
use tokio_postgres::types::Type;

use super::link::Link;
use super::words;

pub(super) const FLOW: &str = "count_words_of_a_folder";

/// Each depends on the one before it. The second is the map.
pub(super) const STEPS: [&str; 4] = ["list_files", "count_words", "top_words", "write_result"];
pub(super) const MAP: usize = 1;

/// A lost connection costs a try, so there are some to spare; and the wait before the next is short.
const TRIES_MAX: i32 = 5;
const BASE_DELAY_S: i32 = 1;

/// Makes flow and steps, or finds them there.
pub(super) async fn define(link: &mut Link) -> Result<(), tokio_postgres::Error> {
    let create =
        "select flow_slug from pgflow.create_flow($1, max_attempts => $2, base_delay => $3)";
    link.insist(
        create,
        &[
            (&FLOW, Type::TEXT),
            (&TRIES_MAX, Type::INT4),
            (&BASE_DELAY_S, Type::INT4),
        ],
    )
    .await?;
    let add = "select step_slug from pgflow.add_step($1, $2, deps_slugs => $3, step_type => $4)";
    for (at, step) in STEPS.iter().enumerate() {
        let before: Vec<&str> = at.checked_sub(1).map(|at| STEPS[at]).into_iter().collect();
        let kind = if at == MAP { "map" } else { "single" };
        link.insist(
            add,
            &[
                (&FLOW, Type::TEXT),
                (step, Type::TEXT),
                (&before, Type::TEXT_ARRAY),
                (&kind, Type::TEXT),
            ],
        )
        .await?;
    }
    Ok(())
}

/// What a run is started with.
pub(super) fn input(folder: &Path, results: &Path) -> Value {
    json!({ "folder": folder.display().to_string(), "results": results.display().to_string() })
}

/// The work of one task. Blocks; may be repeated.
pub(super) fn work(run: &str, step: &str, input: &Value) -> Result<Value, String> {
    let said = |key: &str| {
        input["run"][key]
            .as_str()
            .ok_or_else(|| format!("the run's input names no {key}"))
    };
    match step {
        "list_files" => words::list_files(Path::new(said("folder")?)),
        "count_words" => words::count_words(input),
        "top_words" => {
            let counted = input["count_words"].as_array();
            let counted = counted.ok_or("count_words brought no array")?;
            Ok(words::top_words(said("folder")?, counted))
        }
        "write_result" => {
            words::write_result(Path::new(said("results")?), run, &input["top_words"])
        }
        other => Err(format!("no step `{other}` is known here")),
    }
}
