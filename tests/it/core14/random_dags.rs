//! Random flows as at 0.7 (`core::random_dags`), whose steps also have conditions and are skipped.

use flowgate::schema::PgflowApi;

use crate::core::random_dags::random_flows_end_as_the_reference_says;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_flows_that_skip_end_as_the_reference_says_whatever_becomes_of_their_workers() {
    random_flows_end_as_the_reference_says(PgflowApi::V0_14).await;
}
