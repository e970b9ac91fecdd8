use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use local_postgres::testing::private_cluster;
use local_postgres::{Cluster, Error, Mode, Options};
use sqlx::{Connection, PgConnection};

async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.unwrap()
}

async fn setting(cluster: &Cluster, name: &str) -> String {
    let mut connection = connect(&cluster.url("postgres")).await;
    sqlx::query_scalar("SELECT current_setting($1)")
        .bind(name)
        .fetch_one(&mut connection)
        .await
        .unwrap()
}

/// A directory that the server's user may enter although it is temporary.
fn open_directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o711))
        .tempdir()
        .unwrap()
}

fn options(directory: &Path) -> Options {
    Options {
        durable: false,
        ..Options::new(directory.join("postgres"))
    }
}

fn process_exists(pid: u32) -> bool {
    let script = format!("kill -0 {pid} 2>/dev/null");
    Command::new("sh")
        .args(["-c", &script])
        .status()
        .unwrap()
        .success()
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(
            started.elapsed() < Duration::from_secs(15),
            "timed out waiting until {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn data_survives_fast_and_immediate_restarts_on_the_same_port() {
    let cluster = private_cluster().await;
    let url = cluster.create_database("kept").await.unwrap();
    assert_eq!(
        cluster.create_database("kept").await.unwrap(),
        url,
        "creating it again changes nothing"
    );
    let mut connection = connect(&url).await;
    sqlx::query("CREATE TABLE fact (n int)")
        .execute(&mut connection)
        .await
        .unwrap();

    for (mode, expected) in [(Mode::Fast, 1_i64), (Mode::Immediate, 2)] {
        let mut connection = connect(&url).await;
        sqlx::query("SET synchronous_commit = on")
            .execute(&mut connection)
            .await
            .unwrap();
        sqlx::query("INSERT INTO fact VALUES (1)")
            .execute(&mut connection)
            .await
            .unwrap();
        let before = cluster.pid();
        cluster.restart(mode).await.unwrap();
        assert_ne!(cluster.pid(), before);
        let mut connection = connect(&url).await;
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM fact")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!(count, expected);
    }
}

#[tokio::test]
async fn durability_is_the_default_and_settings_are_applied() {
    let directory = open_directory();
    let durable = Options {
        settings: vec![("work_mem".into(), "5MB".into())],
        ..Options::new(directory.path().join("postgres"))
    };
    let cluster = Cluster::start(durable).await.unwrap();
    assert_eq!(setting(&cluster, "fsync").await, "on");
    assert_eq!(setting(&cluster, "synchronous_commit").await, "on");
    assert_eq!(setting(&cluster, "work_mem").await, "5MB");
    assert_eq!(setting(&cluster, "max_connections").await, "300");
    assert_eq!(setting(&cluster, "max_locks_per_transaction").await, "256");
    assert_eq!(setting(&cluster, "listen_addresses").await, "127.0.0.1");
    assert_eq!(setting(&cluster, "unix_socket_directories").await, "");
    cluster.stop().await.unwrap();
    assert!(!cluster.is_running());
    drop(cluster);
    Cluster::remove(&directory.path().join("postgres")).unwrap();
    assert!(!directory.path().join("postgres").exists());
}

#[tokio::test]
async fn a_wrong_password_is_refused_and_the_real_one_is_private() {
    use std::os::unix::fs::MetadataExt;

    let directory = open_directory();
    for durable in [true, false] {
        let home = directory.path().join(format!("durable-{durable}"));
        let cluster = Cluster::start(Options {
            durable,
            ..Options::new(&home)
        })
        .await
        .unwrap();
        let password = std::fs::read_to_string(home.join("password")).unwrap();
        for wrong in ["wrong", ""] {
            let url = cluster.url("postgres").replace(&password, wrong);
            let error = PgConnection::connect(&url).await.unwrap_err();
            assert!(
                error
                    .as_database_error()
                    .is_some_and(|error| error.code().as_deref() == Some("28P01")),
                "{error}"
            );
        }
        assert_eq!(
            std::fs::metadata(home.join("password")).unwrap().mode() & 0o777,
            0o600
        );
        assert!(!home.join("initialising.password").exists());
    }
}

#[tokio::test]
async fn a_second_server_on_the_same_data_is_refused_with_the_process_to_stop() {
    let directory = open_directory();
    let cluster = Cluster::start(options(directory.path())).await.unwrap();
    match Cluster::start(options(directory.path())).await {
        Err(error @ Error::AlreadyRunning { pid, port, .. }) => {
            assert_eq!((pid, port), (cluster.pid(), cluster.port()));
            assert!(
                error.to_string().contains(&format!("kill -INT {pid}")),
                "{error}"
            );
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
    assert!(matches!(
        Cluster::remove(&directory.path().join("postgres")),
        Err(Error::AlreadyRunning { .. })
    ));
}

#[tokio::test]
async fn a_lock_file_that_names_an_unrelated_live_process_does_not_block_the_start() {
    let directory = open_directory();
    let cluster = Cluster::start(options(directory.path())).await.unwrap();
    let home = cluster.data_dir().to_owned();
    cluster.stop().await.unwrap();
    drop(cluster);
    let stale = format!(
        "{}\n{}\n1\n5432\n\n127.0.0.1\n  1 2\nready   \n",
        std::process::id(),
        home.join("data").display()
    );
    std::fs::write(home.join("data/postmaster.pid"), stale).unwrap();

    let cluster = Cluster::start(options(directory.path())).await.unwrap();
    assert!(cluster.is_running());
}

#[tokio::test]
async fn a_taken_fixed_port_is_an_error_that_shows_the_log() {
    let directory = open_directory();
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = Cluster::start(Options {
        port: Some(port),
        ..options(directory.path())
    })
    .await
    .unwrap_err();
    assert!(
        error.to_string().contains("Address already in use"),
        "{error}"
    );
}

#[tokio::test]
async fn invalid_database_names_are_refused() {
    let cluster = private_cluster().await;
    for name in ["", "1a", "A", "a-b", "a b", "a;drop", &"a".repeat(64)] {
        assert!(
            matches!(
                cluster.create_database(name).await,
                Err(Error::InvalidName(_))
            ),
            "{name}"
        );
    }
}

/// The body of a process that the next test kills: it holds a cluster until it dies.
#[tokio::test]
async fn holds_a_cluster_when_asked_to() {
    let Some(directory) = std::env::var_os("LOCAL_POSTGRES_TEST_HOLD") else {
        return;
    };
    let cluster = Cluster::start(options(Path::new(&directory)))
        .await
        .unwrap();
    std::fs::write(Path::new(&directory).join("pid"), cluster.pid().to_string()).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn the_server_ends_when_its_owner_is_killed_and_the_data_can_be_used_again() {
    let directory = open_directory();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cluster::holds_a_cluster_when_asked_to"])
        .env("LOCAL_POSTGRES_TEST_HOLD", directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let read_pid = || {
        std::fs::read_to_string(directory.path().join("pid"))
            .ok()
            .and_then(|text| text.parse::<u32>().ok())
    };
    until("the owner has started its server", || read_pid().is_some()).await;
    let pid = read_pid().unwrap();
    assert!(process_exists(pid));
    owner.kill().unwrap();
    owner.wait().unwrap();

    // Starts while the old server is shutting down, which must be waited for.
    let cluster = Cluster::start(options(directory.path())).await.unwrap();
    assert_ne!(cluster.pid(), pid);
    cluster.stop().await.unwrap();
}
