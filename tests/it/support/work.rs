//! Does the tasks of the flow `greet`, whose one step is `hello`, as a worker would.

use futures_util::future::try_join_all;
use tokio_postgres::Client;
use uuid::Uuid;

use super::proxy::text;

/// That many tasks, as a worker does them.
pub(crate) async fn finish(direct: &Client, mut tasks: usize) {
    let worker = Uuid::new_v4();
    direct
        .batch_execute(&format!(
            "insert into pgflow.workers (worker_id, queue_name, function_name) values ('{worker}', 'greet', 'test')"
        ))
        .await
        .unwrap();
    while tasks > 0 {
        let poll = format!(
            "select string_agg(msg_id::text, ',') from pgmq.read_with_poll('greet', 60, {}, 5, 20)",
            tasks.min(100)
        );
        let messages = text(direct, &poll).await;
        assert_ne!(messages, "null", "{tasks} tasks are missing");
        let begin = format!(
            "select string_agg(run_id::text, ',') from pgflow.start_tasks('greet', array[{messages}]::bigint[], '{worker}')"
        );
        let begun = text(direct, &begin).await;
        let done = begun.split(',').map(|run| {
            let sql = format!("select pgflow.complete_task('{run}', 'hello', 0, '\"hi\"'::jsonb)");
            async move { direct.batch_execute(&sql).await }
        });
        tasks -= try_join_all(done).await.unwrap().len();
    }
}
