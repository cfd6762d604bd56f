//! The protocol as a client sees it: everything a direct connection says, in the same order.

use crate::support::pg::fresh_database;
use crate::support::proxy::{Proxy, text};

#[tokio::test]
async fn a_driver_does_a_days_work() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let client = proxy.connect().await;
    assert_eq!(text(&client, "select 40 + 2").await, "42");
    let statement = client.prepare("select $1::int4 * 2").await.unwrap();
    let doubled: i32 = client.query_one(&statement, &[&21]).await.unwrap().get(0);
    assert_eq!(doubled, 42);
    assert_eq!(
        proxy.raw().await.query("select 'raw'").await,
        "T ?column?:25/0\nD raw\nC SELECT 1\nZ I"
    );
    proxy.shut_down().await;
}
