//! Section 6 and 7: caps, descriptors that run out, the log.

use crate::support::*;
use std::io::BufRead;
use std::process::Command;
use std::time::Duration;

#[test]
fn beyond_the_cap_clients_are_told_so() {
    let server = Server::start(&["--max-connections", "3"]);
    let rest = server.at_rest();
    let held: Vec<_> = (0..3).map(|_| server.begin("sleep 1000")).collect();
    for _ in 0..20 {
        let response = server.get("/run?command=true", "");
        assert_eq!((response.status, response.field("retry-after")), (503, Some("1")));
        assert!(response.complete && response.field("date").is_some());
    }
    // Refusals come before want of room.
    for (request, status) in [
        ("GET /run?command=true HTTP/1.1\r\nHost: evil.test", 421),
        ("GET /none HTTP/1.1\r\nHost: localhost", 404),
        ("GET /run?command= HTTP/1.1\r\nHost: localhost", 400),
        ("GET / HTTP/1.1\r\nHost: localhost", 503),
        ("OPTIONS * HTTP/1.1\r\nHost: localhost", 503),
        ("HEAD /run?command=true HTTP/1.1\r\nHost: localhost", 503),
    ] {
        let mut client = server.connect();
        client.write(format!("{request}\r\n\r\n"));
        let head = client.head();
        assert_eq!(head.status, status, "{request}");
        assert_eq!(head.field("connection"), Some("close"), "{request}");
    }
    // No answer comes before its request: proxies lose count.
    let mut client = server.connect();
    client.stream.get_ref().set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(client.stream.fill_buf().is_err());
    client.write("GET /run?command=true HTTP/1.1\r\nHost: localhost\r\n\r\n");
    client.stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(client.response().status, 503);
    assert_eq!(server.children().len(), 3);
    drop((held, client));
    server.comes_to_rest(rest);
    assert_eq!(outcome(&server.run("true")), "exited:0");
    server.logged(&["refuse peer=127.0.0.1:", "status=503"]);
}

fn limited(limits: &str) -> Server {
    let mut command = Command::new("sh");
    command.args([
        "-c",
        &format!("{limits}; exec \"$0\" --listen 127.0.0.1:0 --grace 0.5"),
        BINARY,
    ]);
    Server::start_command(command)
}

#[test]
fn without_descriptors_it_refuses_and_recovers() {
    let server = limited("ulimit -n 24");
    let rest = server.at_rest();
    let mut held = Vec::new();
    let refused = loop {
        let mut client = server.connect();
        client.write(format!(
            "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\n\r\n",
            server.address
        ));
        let head = client.head();
        match head.status {
            200 => held.push(client),
            _ => break head,
        }
        assert!(held.len() < 24);
    };
    assert_eq!(refused.status, 503);
    // Idle connections take up what is left; the processor stays idle.
    let idle: Vec<_> = (0..40).map(|_| server.connect()).collect();
    let before = server.processor_time();
    std::thread::sleep(Duration::from_secs(2));
    assert!(server.processor_time() - before < 40, "it spins");
    drop((held, idle));
    server.comes_to_rest(rest);
    assert_eq!(outcome(&server.run("true")), "exited:0");
}

/// While nobody accepts, connections wait; std's own backlog would leave room for 128.
#[test]
fn a_burst_of_connections_waits_in_the_backlog() {
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let count = 400.min(most.trim().parse().unwrap());
    let server = Server::start(&["--max-connections", "500"]);
    server.signal("STOP");
    let address = server.address.parse().unwrap();
    let connect = |_| std::net::TcpStream::connect_timeout(&address, Duration::from_secs(10));
    let clients: Vec<_> = (0..count).map(connect).collect();
    server.signal("CONT");
    assert!(clients.iter().all(Result::is_ok));
    for client in clients.into_iter().flatten() {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Client::of(client);
        client.write(format!("GET /none HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
        assert_eq!(client.response().status, 404);
    }
}

#[test]
fn log_lines_are_of_one_form_and_cannot_be_forged() {
    let server = Server::start(&["--verbose"]);
    server.run("printf 'a\\n2026-11-22T12:00:00.000Z run\\033[31m\\377'");
    server.get(&run_target("nonesuch \"\n2026-01-01T00:00:00.000Z shutdown\""), "");
    server.get("/run?command='%0d%0a%1b", "");
    server.send("GET /\" HTTP/1.1\r\nHost: x\r\n\r\n");
    server.logged(&["refuse", "status=421", "target=\"/\\\"\""]);
    server.logged(&["exit", "pid=0 out=failed code=127", "why=\"cannot run nonesuch"]);
    let log = server.log();
    let is_time =
        |time: &str| time.len() == 24 && time.ends_with('Z') && time.as_bytes()[10] == b'T';
    for line in log.lines() {
        let mut words = line.split(' ');
        assert!(words.next().is_some_and(is_time), "{line}");
        assert!(
            words
                .next()
                .is_some_and(
                    |word| ["run", "exit", "refuse", "stdout", "stderr", "listen"].contains(&word)
                ),
            "{line}"
        );
        assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line:?}");
    }
    assert!(log.contains("stdout peer="), "{log}");
    assert!(log.contains("out=\"a\\n2026-11-22T12:00:00.000Z run\\x1b[31m\\xff\""), "{log}");
    let exit = server.logged(&["exit", "stdout_bytes=36"]);
    assert!(
        exit.contains(" pid=")
            && exit.contains(" out=exited code=0 ms=")
            && exit.contains(" stderr_bytes=0"),
        "{exit}"
    );
    let quiet = Server::start(&[]);
    quiet.run("echo unlogged-output");
    assert!(
        quiet
            .logged(&["run peer=127.0.0.1:", "pid="])
            .ends_with("command=\"echo unlogged-output\"")
    );
    assert!(!quiet.log().contains("stdout peer="));
}

/// Every way in which a stream can have nothing to do.
#[test]
fn waiting_takes_no_processor_time() {
    let server = Server::start(&["--timeout", "1", "--grace", "0.2"]);
    let patient = Server::start(&[]);
    let post = |command: &str, content: &str| {
        let rest = format!("Content-Length: 1000000\r\n\r\n{content}");
        patient.begin_post(command, &rest).0
    };
    let half_closed = patient.begin("sleep 1000").0;
    half_closed.half_close();
    let silent = [
        patient.begin("sleep 1000").0,
        half_closed,
        // Its pipes have ended, its client does not read, its input is not read, is closed, or does not come.
        patient.begin("sh -c 'exec >&- 2>&-; exec sleep 1000'").0,
        patient.begin("yes").0,
        post("sleep 1000", &"x".repeat(200_000)),
        post("sh -c 'exec <&-; exec sleep 1000'", "x"),
        post("cat", ""),
        // Killed, while its client does not read what is left.
        server.begin("yes").0,
    ];
    std::thread::sleep(Duration::from_secs(2));
    for server in [&server, &patient] {
        let before = server.processor_time();
        std::thread::sleep(Duration::from_secs(2));
        let spent = server.processor_time() - before;
        assert!(spent < 40, "{spent} ticks in 2 s");
    }
    drop(silent);
}
