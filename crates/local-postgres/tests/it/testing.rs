use local_postgres::testing::{database, private_cluster};

#[tokio::test]
async fn every_database_is_fresh_and_on_one_cluster() {
    let (one, other) = tokio::join!(database(), database());
    assert_ne!(one.name(), other.name());
    sqlx::query("CREATE TABLE fact (n int)")
        .execute(one.pool())
        .await
        .unwrap();
    let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_class WHERE relname = 'fact'")
        .fetch_one(other.pool())
        .await
        .unwrap();
    assert_eq!(tables, 0);
    let started = "SELECT pg_postmaster_start_time()::text";
    let first: String = sqlx::query_scalar(started)
        .fetch_one(one.pool())
        .await
        .unwrap();
    let second: String = sqlx::query_scalar(started)
        .fetch_one(other.pool())
        .await
        .unwrap();
    assert_eq!(first, second);
}

#[tokio::test]
async fn a_database_is_dropped_with_its_value_even_while_it_is_in_use() {
    let watcher = database().await;
    let used = database().await;
    let name = used.name().to_owned();
    let _open = used.pool().acquire().await.unwrap();
    drop(used);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_database WHERE datname = $1")
        .bind(&name)
        .fetch_one(watcher.pool())
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_private_cluster_is_not_the_shared_one_and_leaves_nothing() {
    let shared = database().await;
    let private = private_cluster().await;
    let port: String = sqlx::query_scalar("SELECT current_setting('port')")
        .fetch_one(shared.pool())
        .await
        .unwrap();
    assert_ne!(port, private.port().to_string());
    let directory = private.data_dir().to_owned();
    assert!(directory.exists());
    drop(private);
    assert!(!directory.exists());
}
