//! Hours of mixed load, or as many seconds as SOAK_SECONDS says.

use crate::support::*;
use std::io::{BufRead, Read};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

const CLIENTS: u64 = 16;
/// After which memory is to stay where it is.
const WARM_UP: Duration = Duration::from_secs(10);

/// A stream that ran to its end is complete by its byte counts.
fn complete(events: &[Event], expected: &str) -> usize {
    assert_eq!(outcome(events), expected);
    let exit = events.last().unwrap();
    for (source, count) in [("stdout", "stdout_bytes"), ("stderr", "stderr_bytes")] {
        let length = output(events, source).len();
        assert_eq!(exit.number(count), length as i64, "{source}");
    }
    1
}

/// One of the things that clients do. Returns how many streams ran to their end.
fn act(server: &Server, numbers: &mut Numbers) -> usize {
    let host = &server.address;
    match numbers.below(9) {
        0 => complete(&server.run("echo short"), "exited:0"),
        1 => complete(&server.run("sh -c 'echo failed >&2; exit 3'"), "exited:3"),
        2 => complete(&server.run(&format!("seq {}", numbers.below(200_000))), "exited:0"),
        3 => complete(&server.run("sh -c 'sleep 100 & echo left; exit 4'"), "exited:4"),
        4 => {
            // Several on one connection, the last one cut off.
            let mut client = server.connect();
            let count = numbers.below(5);
            for number in 0..count {
                client.write(format!(
                    "GET /run?command=echo+{number} HTTP/1.1\r\nHost: {host}\r\n\r\n"
                ));
                complete(&client.response().events(), "exited:0");
            }
            client.write(format!("GET /run?command=echo HTTP/1.1\r\nHost: {host}\r\n"));
            count as usize
        }
        5 => {
            // A flood, left at some point, read or not.
            let (mut client, _) = server.begin("yes");
            let mut buffer = vec![0; numbers.below(1 << 20) as usize];
            client.stream.read_exact(&mut buffer).unwrap();
            0
        }
        6 => {
            let (client, _) = server.begin("sleep 100");
            std::thread::sleep(Duration::from_millis(numbers.below(200)));
            drop(client);
            0
        }
        7 => {
            let content: String =
                (0..numbers.below(20_000)).map(|each| format!("{each}\n")).collect();
            let length = content.len();
            let fields = format!("Host: {host}\r\nContent-Length: {length}\r\n");
            let request = format!("POST /run?command=cat HTTP/1.1\r\n{fields}\r\n{content}");
            let events = server.send(request).events();
            assert!(output(&events, "stdout") == content);
            complete(&events, "exited:0")
        }
        _ => {
            // Bytes that are no request, or one that is mangled; slow reading.
            let request = format!("GET /run?command=seq+5000 HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let mut request = request.into_bytes();
            let place = numbers.below(request.len() as u64) as usize;
            request[place] ^= numbers.below(256) as u8;
            let mut client = server.connect();
            client.write(request);
            client.half_close();
            while let Ok(length) = client.stream.fill_buf().map(|piece| piece.len().min(2000)) {
                if length == 0 {
                    break;
                }
                client.stream.consume(length);
                std::thread::sleep(Duration::from_millis(1));
            }
            0
        }
    }
}

/// All clients at once, until `end`. Returns how many streams ran to their end.
fn load(server: &Server, seed: u64, end: Instant) -> usize {
    let completed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let completed = &completed;
            scope.spawn(move || {
                let mut numbers = Numbers(seed * CLIENTS + client + 1);
                while Instant::now() < end {
                    completed.fetch_add(act(server, &mut numbers), SeqCst);
                }
            });
        }
    });
    completed.into_inner()
}

#[test]
#[ignore = "takes as long as SOAK_SECONDS says"]
fn soak_of_mixed_load() {
    let seconds = std::env::var("SOAK_SECONDS").map_or(60, |text| text.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let server = Server::start(&["--grace", "0.5"]);
    let rest = server.at_rest();
    let mut completed = load(&server, 1, Instant::now() + WARM_UP);
    server.comes_to_rest(rest);
    let before = server.memory();
    completed += load(&server, 2, end);
    server.comes_to_rest(rest);
    let after = server.memory();
    println!("{completed} streams ran to their end; {before} kB, then {after} kB");
    assert!(completed > 100, "{completed}");
    assert!(after <= before + 3 * 1024, "{before} kB, then {after} kB");
    for line in server.log().lines() {
        let happening = line.split(' ').nth(1).unwrap_or_default();
        assert!(["listen", "run", "exit", "refuse", "lost"].contains(&happening), "{line}");
    }
}
