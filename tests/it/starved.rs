//! Where processes, threads, descriptors or addresses run out: a user of its own, with low limits.

use crate::support::*;
use std::process::Command;
use std::time::Duration;

/// A server of a user that nobody else is, so that only its own processes count; limited as `prlimit` takes it.
fn limited(folder: &Folder, user: &str, limit: &str) -> Server {
    let binary = folder.path("ssecommander");
    std::fs::copy(BINARY, &binary).unwrap();
    for path in [folder.path(""), binary.clone()] {
        assert!(Command::new("chmod").args(["755", &path]).status().unwrap().success());
    }
    let mut command = Command::new("prlimit");
    command.args([limit, "setpriv", "--reuid", user, "--regid", user, "--clear-groups"]);
    command.args([&binary, "--listen", "127.0.0.1:0", "--grace", "0.5"]);
    command.current_dir("/");
    Server::start_command(command)
}

/// Starts streams until one is refused, and expects the server to stay idle, to recover, and to have panicked nowhere.
fn starves_and_recovers(user: &str, limit: &str) {
    let folder = Folder::new();
    let server = limited(&folder, user, limit);
    let rest = server.at_rest();
    for _ in 0..3 {
        let mut held = Vec::new();
        loop {
            let mut client = server.connect();
            client.write(format!(
                "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\n\r\n",
                server.address
            ));
            let head = client.head();
            if head.status != 200 {
                assert_eq!((head.status, head.field("retry-after")), (503, Some("1")));
                break;
            }
            held.push(client);
            assert!(held.len() < 120, "nothing runs out");
        }
        assert!(!held.is_empty());
        // Refused again and again, and idle in between.
        for _ in 0..20 {
            assert_eq!(server.get("/run?command=true", "").status, 503);
        }
        let before = server.processor_time();
        std::thread::sleep(Duration::from_secs(1));
        let spent = server.processor_time() - before;
        assert!(spent < 20, "it spins: {spent} ticks");
        drop(held);
        server.comes_to_rest(rest);
        assert_eq!(outcome(&server.run("true")), "exited:0");
    }
    server.comes_to_rest(rest);
    let log = server.log();
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
#[ignore = "needs root and util-linux"]
fn starved_of_processes_and_threads() {
    starves_and_recovers("54321", "--nproc=40");
}

#[test]
#[ignore = "needs root and util-linux"]
fn starved_of_descriptors() {
    starves_and_recovers("54322", "--nofile=40");
}

#[test]
#[ignore = "needs root and util-linux"]
fn starved_of_addresses() {
    starves_and_recovers("54323", "--as=30000000");
}
