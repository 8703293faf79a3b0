//! Sections 2, 6 and 7: how many at once, who waits, descriptors that run out.

use crate::support::*;
use std::io::BufRead;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

#[test]
fn beyond_the_cap_clients_are_told_so() {
    let server = Server::start(&["--max-commands", "3"]);
    let rest = server.at_rest();
    let held: Vec<_> = (0..3).map(|_| server.begin("sleep 1000")).collect();
    let post = "POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\ncommand=true";
    for round in 0..20 {
        let response = match round % 3 {
            0 => server.get("/run?command=true", ""),
            1 => server.get("/run?command=true", "Accept: text/plain\r\n"),
            _ => server.send(post),
        };
        assert_eq!((response.status, response.field("retry-after")), (503, Some("1")));
        assert!(response.complete && response.field("date").is_some());
        assert!(response.text().lines().count() == 1, "{response:?}");
    }
    // A place is what a command takes: nothing else needs one, and whatever else is wrong is said first.
    for (request, status) in [
        ("GET /run?command=true HTTP/1.1\r\nHost: evil.test", 421),
        ("GET /none HTTP/1.1\r\nHost: localhost", 404),
        ("GET /run?command= HTTP/1.1\r\nHost: localhost", 400),
        ("GET /run?command=true HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: 1", 204),
        ("GET / HTTP/1.1\r\nHost: localhost", 200),
        ("GET /commands HTTP/1.1\r\nHost: localhost", 200),
        ("OPTIONS /run HTTP/1.1\r\nHost: localhost", 204),
    ] {
        let mut client = server.connect();
        client.write(format!("{request}\r\n\r\n"));
        assert_eq!(client.head().status, status, "{request}");
    }
    // No answer comes before its request: proxies lose count.
    let mut client = server.connect();
    let timeout = |client: &Client, time| {
        let socket = client.stream.get_ref();
        socket.set_read_timeout(Some(time)).unwrap();
    };
    timeout(&client, Duration::from_millis(200));
    assert!(client.stream.fill_buf().is_err());
    timeout(&client, PATIENCE);
    // And the connection may ask again, as soon as there is a place.
    let request = "GET /run?command=true HTTP/1.1\r\nHost: localhost\r\n\r\n";
    client.write(request);
    assert_eq!(client.response().status, 503);
    assert_eq!(server.session().len(), 3);
    drop(held);
    server.session_has(0);
    wait_for("a place", || server.get("/run?command=true", "").status == 200);
    drop(client);
    server.comes_to_rest(rest);
    server.logged(&["refuse peer=127.0.0.1:", "status=503"]);
}

/// The place is free when the end of the stream is there.
#[test]
fn one_place_serves_one_after_the_other() {
    let server = Server::start(&["--max-commands", "1"]);
    let mut client = server.connect();
    for number in 0..50 {
        client.write(format!(
            "GET /run?command=echo+{number} HTTP/1.1\r\nHost: {}\r\n\r\n",
            server.address
        ));
        let events = client.response().events();
        assert_eq!(output(&events, "stdout"), format!("{number}\n"));
    }
    for _ in 0..50 {
        assert_eq!(outcome(&server.run("true")), "exited:0");
    }
}

/// Who is silent has no place.
#[test]
fn silent_connections_take_no_place() {
    let server = Server::start(&["--max-commands", "16"]);
    let rest = server.at_rest();
    for _ in 0..3 {
        let silent: Vec<_> = (0..40).map(|_| server.connect()).collect();
        let held: Vec<_> = (0..15).map(|_| server.begin("sleep 1000")).collect();
        for _ in 0..5 {
            assert_eq!(outcome(&server.run("true")), "exited:0");
        }
        drop((held, silent));
        server.comes_to_rest(rest);
    }
    let held: Vec<_> = (0..16).map(|_| server.begin("sleep 1000")).collect();
    assert_eq!(server.session().len(), held.len());
}

/// 512 are served beside the commands. The others wait, but not for longer than one may be silent.
#[test]
fn hundreds_of_silent_connections_keep_nobody_out() {
    let server = Server::start(&[]);
    let rest = server.at_rest();
    let held: Vec<_> = (0..20).map(|_| server.begin("sleep 1000")).collect();
    let silent = SilentConnections::open(&server.address, 490);
    let start = Instant::now();
    for _ in 0..5 {
        assert_eq!(outcome(&server.run("true")), "exited:0");
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    drop(silent);
    let more = SilentConnections::open(&server.address, 610);
    let start = Instant::now();
    assert_eq!(outcome(&server.run("true")), "exited:0");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    drop((held, more));
    server.comes_to_rest(rest);
}

/// A client that sends its request byte by byte holds up itself.
#[test]
fn nobody_waits_for_another_one_s_request() {
    let server = Server::start(&[]);
    let mut slow: Vec<_> = (0..10).map(|_| server.connect()).collect();
    for byte in "GET /run?command=true HTTP/1.1\r\n".bytes() {
        for client in &mut slow {
            client.write([byte]);
        }
        assert_eq!(outcome(&server.run("true")), "exited:0");
    }
}

fn limited(limits: &str) -> Server {
    let mut command = binary_by_shell(limits);
    command.args(["--listen", "127.0.0.1:0", "--grace", "0.5"]);
    Server::start_command(command)
}

#[test]
fn without_descriptors_it_refuses_and_recovers() {
    let refusals = AtomicUsize::new(0);
    // Each number leaves another one over for the last that tries.
    at_once(24..28, |limit| {
        let server = limited(&format!("ulimit -n {limit}"));
        let rest = server.at_rest();
        let held = until_none_is_left(&server, &refusals);
        // Silent connections take up what is left; the processor stays idle.
        let silent: Vec<_> = (0..40).map(|_| server.connect()).collect();
        let mut waiting = server.connect();
        waiting.write(format!("GET /none HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
        stays_idle(&server);
        drop((held, silent));
        // Who has waited meanwhile is served.
        assert_eq!(waiting.response().status, 404);
        drop(waiting);
        server.comes_to_rest(rest);
        assert_eq!(outcome(&server.run("true")), "exited:0");
        assert!(!server.log().contains("panicked"), "{}", server.log());
    });
    assert!(refusals.into_inner() > 0);
}

/// Starts streams until one is refused, which is counted, or waits for longer than anything takes. Returns those that
/// were started.
pub fn until_none_is_left(server: &Server, refusals: &AtomicUsize) -> Vec<Client> {
    let mut held = Vec::new();
    loop {
        let mut client = server.connect();
        client.write(format!(
            "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\n\r\n",
            server.address
        ));
        let socket = client.stream.get_ref();
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        if client.stream.fill_buf().is_err() {
            break;
        }
        let head = client.head();
        if head.status != 200 {
            assert_eq!((head.status, head.field("retry-after")), (503, Some("1")));
            refusals.fetch_add(1, SeqCst);
            break;
        }
        held.push(client);
        assert!(held.len() < 150, "nothing runs out");
    }
    assert!(!held.is_empty());
    held
}

pub fn stays_idle(server: &Server) {
    let before = server.processor_time();
    std::thread::sleep(Duration::from_secs(1));
    let spent = server.processor_time() - before;
    assert!(spent < 25, "it spins: {spent} ticks in a second");
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
        patient.begin("sh -c 'exec >&-; exec sleep 1000'").0,
        patient.begin("yes").0,
        post("sleep 1000", &"x".repeat(200_000)),
        post("sh -c 'exec <&-; exec sleep 1000'", "x"),
        post("cat", ""),
        // Stopped, and what somebody outside keeps open.
        patient.begin("sh -c 'kill -STOP $$'").0,
        // Killed, while its client does not read what is left.
        server.begin("yes").0,
    ];
    std::thread::sleep(Duration::from_secs(2));
    let servers = [&server, &patient];
    let before = servers.map(Server::processor_time);
    std::thread::sleep(Duration::from_secs(2));
    for (server, before) in servers.into_iter().zip(before) {
        let spent = server.processor_time() - before;
        assert!(spent < 40, "{spent} ticks in 2 s");
    }
    drop(silent);
}
