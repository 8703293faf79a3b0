//! Where processes, threads, descriptors or addresses run out: a user of its own, with low limits.

use crate::limits::{stays_idle, until_none_is_left};
use crate::support::*;
use std::io::{Read, Write};
use std::process::Command;
use std::sync::atomic::AtomicUsize;

/// The program as a user that nobody else is, so that only its own processes count; limited as `prlimit` takes it.
fn limited(binary: &[String], user: &str, limit: &str) -> Command {
    let mut command = Command::new("prlimit");
    command.args([limit, "setpriv", "--reuid", user, "--regid", user]);
    command.arg("--clear-groups").args(binary);
    command.args(["--listen", "127.0.0.1:0", "--grace", "0.5"]);
    command.current_dir("/");
    command
}

/// Starts streams until none is to be had, and expects the server to stay idle, to recover, and to have panicked nowhere.
fn starves_and_recovers(user: &str, limit: &str, refusals: &AtomicUsize) {
    let folder = Folder::new();
    let server = Server::start_command(limited(&binary_for_all(&folder), user, limit));
    let rest = server.at_rest();
    for _ in 0..2 {
        let held = until_none_is_left(&server, refusals);
        // Again and again, and idle in between.
        let more: Vec<_> = (0..20).map(|_| server.connect()).collect();
        stays_idle(&server);
        assert_eq!(server.children().len(), held.len());
        drop((held, more));
        server.comes_to_rest(rest);
        assert_eq!(outcome(&server.run("true")), "exited:0");
    }
    server.comes_to_rest(rest);
    let log = server.log();
    assert!(!log.contains("panicked"), "{log}");
}

/// A stream takes several of what is short: each of these leaves another number over for the last.
fn at_each_limit(user: &str, name: &str, limits: std::ops::Range<usize>) {
    let refusals = AtomicUsize::new(0);
    for limit in limits {
        starves_and_recovers(user, &format!("--{name}={limit}"), &refusals);
    }
    assert!(refusals.into_inner() > 0);
}

#[test]
#[ignore = "needs root and util-linux"]
fn starved_of_processes_and_threads() {
    at_each_limit("54321", "nproc", 38..43);
}

#[test]
#[ignore = "needs root and util-linux"]
fn starved_of_descriptors() {
    at_each_limit("54322", "nofile", 36..41);
}

/// Where no thread is to be had that is said; where no memory is, the server ends, and all with it.
#[test]
#[ignore = "needs root and util-linux"]
fn starved_of_addresses() {
    let folder = Folder::new();
    let binary = binary_for_all(&folder);
    for megabytes in [12, 16, 20, 30, 50] {
        let limit = format!("--as={}", megabytes * 1_000_000);
        let mut server = Server::start_command(limited(&binary, "54323", &limit));
        let host = server.address.clone();
        let mut held = Vec::new();
        for _ in 0..120 {
            let Ok(stream) = std::net::TcpStream::connect(&server.address) else {
                break;
            };
            let timeout = Some(std::time::Duration::from_secs(3));
            stream.set_read_timeout(timeout).unwrap();
            let mut client = Client::of(stream);
            client.write(format!("GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {host}\r\n\r\n"));
            let mut answer = [0; 12];
            let read = client.stream.read_exact(&mut answer);
            if read.is_err() || answer != *b"HTTP/1.1 200" {
                assert!(read.is_err() || answer == *b"HTTP/1.1 503", "{answer:?}");
                break;
            }
            held.push(client);
        }
        assert!(held.len() < 120, "nothing runs out");
        drop(held);
        server.session_has(0);
        // It may also end a moment later, or by what it is asked next.
        let mut answer = String::new();
        if let Ok(mut stream) = std::net::TcpStream::connect(&server.address) {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let _ = stream.write_all(b"GET /run?command=true HTTP/1.0\r\n\r\n");
            let _ = stream.read_to_string(&mut answer);
        }
        if !answer.contains("\"out\":\"exited\",\"code\":0") {
            server.exit_status();
            assert_eq!(server.session(), [0; 0]);
        }
        let log = server.log();
        // std itself gives a thread up that way, where there is no room for its signal stack.
        let is_std_s = log.contains("failed to allocate an alternative stack");
        assert!(is_std_s || !log.contains("panicked"), "{log}");
        drop(server);
    }
}

/// Not even a second process: a failure to start like any other.
#[test]
#[ignore = "needs root and util-linux"]
fn starved_at_the_start() {
    let folder = Folder::new();
    let mut command = limited(&binary_for_all(&folder), "54324", "--nproc=1");
    let (status, stdout, stderr) = output_of(&mut command);
    assert_eq!((status, stdout.as_str()), (1, ""), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}
