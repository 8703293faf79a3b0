//! Sections 3 and 4: events, ids, decoding, failures, heartbeats, reconnects, plain text.

use crate::requests::{is_refusal, post, runs, shown};
use crate::support::*;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The text of an `out`, unescaped. What needs no escape must not have one, and what needs one must.
fn text_of(event: &Event) -> String {
    let json = event.data.split_once("\"out\":\"").unwrap().1;
    let json = json.strip_suffix("\"}").unwrap();
    let (mut text, mut signs) = (String::new(), json.chars());
    while let Some(sign) = signs.next() {
        assert!(sign >= ' ' && sign != '"', "{event:?}");
        if sign != '\\' {
            text.push(sign);
            continue;
        }
        let escaped = match signs.next().unwrap() {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'u' => {
                let digits: String = signs.by_ref().take(4).collect();
                assert_eq!(digits.len(), 4, "{event:?}");
                char::from_u32(u32::from_str_radix(&digits, 16).unwrap()).unwrap()
            }
            sign => {
                assert!(sign == '"' || sign == '\\', "\\{sign} in {event:?}");
                sign
            }
        };
        assert!(escaped < ' ' || "\"\\".contains(escaped), "{event:?}");
        text.push(escaped);
    }
    text
}

/// All that came from one source, whatever it is.
fn whole(events: &[Event], source: &str) -> String {
    let events = events.iter().filter(|event| event.event == source);
    events.map(text_of).collect()
}

fn kinds(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.event.as_str()).collect()
}

/// A request whose answer is read byte by byte.
fn raw(server: &Server, request: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = request.replace("HOST", &server.address);
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

#[test]
fn the_head_and_start_come_at_once() {
    for (options, heartbeat) in
        [(&[][..], 15.0), (&["--heartbeat", "2.5"], 2.5), (&["--heartbeat=60"], 60.0)]
    {
        let server = Server::start(options);
        let request = "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: HOST\r\n\r\n";
        // In one piece, while the command has nothing to say.
        let mut piece = [0; 4096];
        let read = raw(&server, request).read(&mut piece).unwrap();
        let piece = String::from_utf8_lossy(&piece[..read]);
        let (head, events) = piece.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(events.contains("\nevent: start\n"), "{piece}");
        let mut client = server.connect();
        client.write(request.replace("HOST", &server.address));
        let head = client.head();
        for (name, value) in [
            ("content-type", "text/event-stream"),
            ("cache-control", "no-cache"),
            ("connection", "keep-alive"),
            ("x-accel-buffering", "no"),
            ("transfer-encoding", "chunked"),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(head.field(name), Some(value));
        }
        assert!(head.field("date").is_some() && head.field("trailer").is_none());
        let events = parse_events(&client.chunk().unwrap());
        assert_eq!(events.len(), 1);
        let pid = events[0].number("pid");
        assert!(is_alive(pid as u32));
        // A number may be written in more ways than one.
        let begin = format!("{{\"type\":\"start\",\"pid\":{pid},\"heartbeat\":");
        let number = events[0].data.strip_prefix(&begin).unwrap();
        let number: f64 = number.strip_suffix('}').unwrap().parse().unwrap();
        assert_eq!(number, heartbeat, "{events:?}");
    }
}

#[test]
fn a_request_with_content_or_of_the_old_version_ends_with_its_stream() {
    let server = Server::start(&["--heartbeat", "0.2"]);
    let fed = post(&server, "/run?command=cat", "", "x");
    assert_eq!(fed.field("connection"), Some("close"));
    assert_eq!(fed.field("transfer-encoding"), Some("chunked"));
    assert_eq!(output(&fed.events(), "stdout"), "x");
    for connection in ["", "Connection: keep-alive\r\n"] {
        let request =
            format!("GET {} HTTP/1.0\r\n{connection}\r\n", run_target("sh -c 'sleep 0.5; echo x'"));
        let old = server.send(&request);
        assert_eq!(old.field("connection"), Some("close"));
        assert_eq!(old.field("transfer-encoding"), None);
        assert_eq!(old.field("content-type"), Some("text/event-stream"));
        assert!(old.text().contains("\n\n:\n"), "{}", old.text());
        assert_eq!(kinds(&old.events()), ["start", "stdout", "exit"]);
        let plain = request.replace("HTTP/1.0", "HTTP/1.0\r\nAccept: text/plain");
        let plain = server.send(&plain);
        assert_eq!((plain.text(), plain.field("trailer")), ("x\n", None));
        assert_eq!(plain.field("connection"), Some("close"));
        assert_eq!(plain.field("transfer-encoding"), None);
    }
}

#[test]
fn ids_count_without_a_gap() {
    let server = Server::start(&[]);
    let events = server
        .run("sh -c 'echo a; echo b >&2; printf \"\\303\"; sleep 0.1; printf \"\\251\"; exit 3'");
    let mut last = 0;
    for (index, event) in events.iter().enumerate() {
        let (millis, number) = event.id.split_once('-').unwrap();
        let millis: u128 = millis.parse().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(now.as_millis() - millis < 60_000 && millis >= last);
        assert_eq!(number, (index + 1).to_string());
        last = millis;
    }
    assert_eq!(output(&events, "stdout"), "a\né");
    assert_eq!(output(&events, "stderr"), "b\n");
    let exit = events.last().unwrap();
    let ms = exit.number("ms");
    assert!(ms >= 100);
    assert_eq!(
        exit.data,
        format!(
            "{{\"type\":\"exit\",\"out\":\"exited\",\"code\":3,\"signal\":null,\"ms\":{ms},\"stdout_bytes\":4,\"stderr_bytes\":2}}"
        )
    );
    let data = |kind| &events.iter().find(|event| event.event == kind).unwrap().data;
    assert_eq!(data("stdout"), "{\"type\":\"stdout\",\"out\":\"a\\n\"}");
    assert_eq!(data("stderr"), "{\"type\":\"stderr\",\"out\":\"b\\n\"}");
}

#[test]
fn characters_split_between_reads_arrive_whole() {
    let server = Server::start(&[]);
    let bytes: String =
        "é€😀".bytes().map(|byte| format!("printf '\\{byte:o}'; sleep 0.02;")).collect();
    for (source, redirection) in [("stdout", ""), ("stderr", " >&2")] {
        let events = server.run(&format!("sh -c \"{{ {bytes} }}{redirection}\""));
        assert_eq!(output(&events, source), "é€😀", "{events:?}");
        assert_eq!(events.len(), 5, "{events:?}");
    }
}

/// What is no UTF-8 becomes U+FFFD as in a browser's decoder, wherever it was split; std has the same rules.
#[test]
fn bytes_that_are_not_text_are_told_apart_as_whatwg_has_it() {
    let server = Server::start(&[]);
    let events = server.run("printf 'a\\377\\342\\202b\\360\\237'");
    assert_eq!(whole(&events, "stdout"), "a\u{fffd}\u{fffd}b\u{fffd}");
    assert_eq!(events.last().unwrap().number("stdout_bytes"), 7);
    let parts: [&[u8]; 16] = [
        b"a",
        b"\n",
        b"\0",
        b"\"",
        b"\\",
        b"\x7f",
        b"\xc3\xa9",
        b"\xe2\x82\xac",
        b"\xf0\x9f\x98\x80",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xe2\x82",
        b"\xf0\x9f",
        b"\xff",
        b"\x80",
    ];
    let mut numbers = Numbers(0xdec0de);
    let mut content = Vec::new();
    for _ in 0..4000 {
        content.extend(parts[numbers.below(16) as usize]);
    }
    content.extend((0..4000).map(|_| numbers.below(256) as u8));
    let expected = String::from_utf8_lossy(&content);
    // In pieces as large as they come, and byte by byte.
    for (source, command) in
        [("stdout", "cat"), ("stdout", "dd bs=1 status=none"), ("stderr", "sh -c 'cat >&2'")]
    {
        let mut client = server.connect();
        client.write(format!(
            "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n",
            run_target(command),
            server.address,
            content.len()
        ));
        client.write(&content);
        let events = client.response().events();
        assert!(whole(&events, source) == expected, "{command}");
        let bytes = events.last().unwrap().number(&format!("{source}_bytes"));
        assert_eq!(bytes, content.len() as i64);
    }
}

#[test]
fn json_escapes_what_it_must_and_nothing_else() {
    let server = Server::start(&[]);
    let mut plain: String = (' '..='\u{7f}').collect();
    plain.push_str("\u{80}\u{85}\u{a0}é\u{2028}\u{2029}\u{fffd}\u{ffff}😀\u{10ffff}");
    plain.retain(|sign| sign != '"' && sign != '\\');
    let controls: String = ('\0'..' ').chain(['"', '\\']).collect();
    let events = post(&server, "/run?command=cat", "", &(plain.clone() + &controls)).events();
    let data: String = events
        .iter()
        .filter(|event| event.event == "stdout")
        .map(|event| event.data.as_str())
        .collect();
    assert!(data.contains(&plain), "{data}");
    assert_eq!(whole(&events, "stdout"), plain + &controls);
}

#[test]
fn output_comes_the_moment_it_is_there() {
    let folder = Folder::new();
    let gate = folder.path("gate");
    let server = Server::start(&[]);
    let wait = format!("while [ ! -e {gate} ]; do sleep 0.01; done");
    // The command waits for a file that is made only when its output has come.
    for redirection in ["", ">&2"] {
        let command = format!("sh -c 'printf no-line-end {redirection}; {wait}; echo over'");
        let (mut client, _) = server.begin(&command);
        client.read_until("no-line-end");
        folder.write("gate", "");
        assert_eq!(output(&client.rest(), "stdout"), "over\n");
        std::fs::remove_file(&gate).unwrap();
    }
    let mut client = server.connect();
    let target = run_target(&format!("sh -c 'printf no-line-end; {wait}; echo over'"));
    client.write(format!(
        "GET {target} HTTP/1.1\r\nHost: {}\r\nAccept: text/plain\r\n\r\n",
        server.address
    ));
    let mut response = client.head();
    client.read_until("no-line-end");
    folder.write("gate", "");
    client.read_content(&mut response);
    assert_eq!(response.text(), "over\n");
}

#[test]
fn large_output_arrives_whole() {
    let server = Server::start(&[]);
    let events = server.run("sh -c 'seq 1 200000 & seq 200001 300000 >&2; wait'");
    let lines = |range: std::ops::RangeInclusive<u32>| {
        range.map(|number| format!("{number}\n")).collect::<String>()
    };
    let (stdout, stderr) = (lines(1..=200_000), lines(200_001..=300_000));
    assert!(output(&events, "stdout") == stdout && output(&events, "stderr") == stderr);
    let exit = events.last().unwrap();
    assert_eq!(exit.number("stdout_bytes"), stdout.len() as i64);
    assert_eq!(exit.number("stderr_bytes"), stderr.len() as i64);
    // Control characters take six bytes each.
    let events = server.run("head -c 1000000 /dev/zero");
    assert!(whole(&events, "stdout") == "\0".repeat(1_000_000));
}

#[test]
fn how_commands_end() {
    let folder = Folder::new();
    let no_interpreter = folder.write("no_interpreter", "#!/no/such/interpreter\n");
    let no_script = folder.write("no_script", "echo hi\n");
    let no_right = folder.write("no_right", "#!/bin/sh\n");
    for file in [&no_interpreter, &no_script] {
        let mut chmod = std::process::Command::new("chmod");
        assert!(chmod.args(["+x", file]).status().unwrap().success());
    }
    let server = Server::start(&[]);
    let long = "x".repeat(5000);
    for (command, expected) in [
        ("true", "exited:0"),
        ("sh -c 'exit 255'", "exited:255"),
        ("sh -c 'kill -9 $$'", "killed:9"),
        ("sh -c 'kill -PIPE $$'", "killed:13"),
        ("nonesuch", "failed:127"),
        ("/no/such", "failed:127"),
        ("/etc/passwd/x", "failed:127"),
        ("''", "failed:127"),
        (&long, "failed:127"),
        ("/etc/passwd", "failed:126"),
        ("/", "failed:126"),
        (&no_right, "failed:126"),
        (&no_script, "failed:126"),
    ] {
        let events = server.run(command);
        assert_eq!(outcome(&events), expected, "{command} {events:?}");
        let is_failed = expected.starts_with("failed");
        let begins = if is_failed { "err" } else { "start" };
        assert_eq!(kinds(&events), [begins, "exit"]);
        assert!(events[0].id.ends_with("-1") && events[1].id.ends_with("-2"));
        if is_failed {
            let begins = "{\"type\":\"error\",\"out\":\"";
            assert!(events[0].data.starts_with(begins), "{events:?}");
        }
        // As plain text no stream has begun.
        let plain = server.get(&run_target(command), "Accept: text/plain\r\n");
        let status = match expected {
            "failed:127" => 404,
            "failed:126" => 403,
            _ => 200,
        };
        assert_eq!(plain.status, status, "{command} {plain:?}");
        if is_failed {
            is_refusal(&plain, status, &[]);
        }
    }
    // The kernel says of a missing interpreter what it says of a missing file.
    let ended = outcome(&server.run(&no_interpreter));
    assert!(ended == "failed:126" || ended == "failed:127", "{ended}");
}

#[test]
fn a_timeout_is_told() {
    let server = Server::start(&["--timeout", "0.4", "--grace", "0.5"]);
    let start = Instant::now();
    let events = server.run("sh -c 'echo a; sleep 1000'");
    assert!(start.elapsed() >= Duration::from_millis(400));
    assert_eq!(kinds(&events), ["start", "stdout", "err", "exit"]);
    assert_eq!(outcome(&events), "timeout:15");
    let err = &events[2].data;
    assert!(err.starts_with("{\"type\":\"error\",\"out\":\"") && err.contains("--timeout"));
    let stubborn = server.run("sh -c 'trap \"\" TERM; while :; do sleep 0.1; done'");
    assert_eq!(outcome(&stubborn), "timeout:9");
    let last_word =
        server.run("sh -c 'trap \"echo bye; exit 7\" TERM; while :; do sleep 0.05; done'");
    assert_eq!(output(&last_word, "stdout"), "bye\n");
    assert_eq!(outcome(&last_word), "timeout:7");
    let plain = server.get("/run?command=sleep+1000", "Accept: text/plain\r\n");
    assert_eq!(plain.trailers, [("exit-signal".into(), "15".into())]);
    assert_eq!(outcome(&server.run("true")), "exited:0");
}

#[test]
fn a_shutdown_is_told() {
    let mut server = Server::start(&[]);
    let mut clients = [(); 3].map(|()| server.begin("sh -c 'echo a; exec sleep 1000'").0);
    for client in &mut clients {
        client.read_until("a\\n");
    }
    server.signal("TERM");
    for client in &mut clients {
        let events = client.rest();
        assert_eq!(kinds(&events), ["err", "exit"]);
        assert_eq!(outcome(&events), "shutdown:15");
        assert!(client.is_closed());
    }
    assert!(server.exit_status().success());
}

/// What has no `exit`, or as plain text no trailer, was cut off, and looks so to every client.
#[test]
fn a_stream_that_is_cut_off_has_no_last_chunk() {
    let server = Server::start(&[]);
    let clients = ["text/event-stream", "text/plain"].map(|accept| {
        let mut client = server.connect();
        client.write(format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nAccept: {accept}\r\n\r\n",
            run_target("sh -c 'echo first; exec sleep 1000'"),
            server.address
        ));
        let head = client.head();
        client.read_until("first");
        (client, head)
    });
    signal_process(server.pid, "KILL");
    for (mut client, mut response) in clients {
        client.read_content(&mut response);
        assert!(!response.complete, "{}", shown(&response));
        assert!(!response.text().contains("exit"), "{}", shown(&response));
    }
}

#[test]
fn silence_is_broken_by_a_comment() {
    let server = Server::start(&["--heartbeat", "0.3"]);
    let (mut client, _) = server.begin("sleep 1000");
    for _ in 0..3 {
        let start = Instant::now();
        assert_eq!(client.chunk().unwrap(), b":\n");
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(200), "{took:?}");
    }
    let plain = server.get("/run?command=sleep+0.7", "Accept: text/plain\r\n");
    assert_eq!(plain.text(), "");
    // Where there is something to say, none is needed.
    let slow = Server::start(&["--heartbeat", "20"]);
    let command = "sh -c 'for i in 1 2 3; do echo $i; sleep 0.2; done'";
    let response = slow.get(&run_target(command), "");
    assert!(!response.text().contains("\n:\n"), "{}", response.text());
}

/// A client that sends no more, or whose content nobody reads, is told from one that has gone by a
/// comment or two, and is a listener like all others then.
#[test]
fn who_has_only_finished_sending_gets_his_answer() {
    let server = Server::start(&[]);
    // They begin together, since each has to take its time.
    let command = "sh -c 'sleep 3; echo late; sleep 0.3'";
    let half_closed = server.begin(command).0;
    half_closed.half_close();
    let unread = format!("Content-Length: 1000000\r\n\r\n{}", "x".repeat(500_000));
    let unread = server.begin_post(command, &unread).0;
    let both = "Content-Length: 200000\r\n\r\n";
    let both = server.begin_post(command, &(both.to_string() + &"x".repeat(200_000))).0;
    both.half_close();
    for (what, mut client) in [("half-closed", half_closed), ("unread", unread), ("both", both)] {
        let said = client.read_until("late");
        let comments = said.lines().filter(|line| *line == ":").count();
        assert!(comments <= 2, "{what}: {comments} comments in 3 s");
        assert_eq!(outcome(&client.rest()), "exited:0", "{what}");
    }
}

/// In plain text no comment tells a half-close from an end.
#[test]
fn who_finishes_sending_has_left_plain_text() {
    let server = Server::start(&[]);
    let mut client = server.connect();
    client.write(format!(
        "GET /run?command=sh+-c+'echo+$$;+exec+sleep+1000' HTTP/1.1\r\nHost: {}\r\nAccept: text/plain\r\n\r\n",
        server.address
    ));
    assert_eq!(client.head().status, 200);
    let pid = String::from_utf8(client.chunk().unwrap()).unwrap();
    client.half_close();
    is_gone(pid.trim().parse().unwrap());
}

/// While content waits that the command does not read, the end of the client's sending is hidden behind it.
#[test]
fn who_leaves_behind_unread_content_is_noticed() {
    let server = Server::start(&["--heartbeat", "1", "--grace", "0.5"]);
    for accept in ["text/plain", "text/event-stream"] {
        let mut client = server.connect();
        client.write(format!(
            "POST /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\nAccept: {accept}\r\nContent-Length: 100000000\r\n\r\n",
            server.address
        ));
        assert_eq!(client.head().status, 200);
        let stream = client.stream.get_ref();
        stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let piece = vec![b'x'; 1 << 20];
        while client.stream.get_mut().write_all(&piece).is_ok() {}
        let children = server.children();
        assert_eq!(children.len(), 1);
        drop(client);
        is_gone(children[0]);
    }
}

/// What brings a hidden end out stands before the next chunk's size, and clients take no more than 16
/// digits of that.
#[test]
fn plain_text_stays_plain_while_unread_content_waits() {
    let server = Server::start(&["--heartbeat", "0.1"]);
    let content = "x".repeat(300_000);
    let target = run_target("sh -c 'sleep 3; echo over'");
    let request = format!(
        "POST {target} HTTP/1.1\r\nHost: HOST\r\nAccept: text/plain\r\nContent-Length: 300000\r\n\r\n{content}"
    );
    let mut answer = Vec::new();
    raw(&server, &request).read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (_, chunks) = answer.split_once("\r\n\r\n").unwrap();
    let (size, rest) = chunks.split_once("\r\n").unwrap();
    assert!(size.len() <= 16, "{chunks:?}");
    assert_eq!(usize::from_str_radix(size, 16), Ok(5), "{chunks:?}");
    let (last, trailer) = rest.strip_prefix("over\n\r\n").unwrap().split_once("\r\n").unwrap();
    assert!(last.len() <= 16 && last.bytes().all(|digit| digit == b'0'));
    assert_eq!(trailer, "Exit-Code: 0\r\n\r\n");
}

#[test]
fn a_reconnect_runs_nothing() {
    let server = Server::start(&[]);
    for (query, fields, status) in [
        ("", "Last-Event-ID: 1795348800000-1\r\n", 204),
        ("", "last-event-id: x\r\n", 204),
        ("", "Last-Event-ID: 1\r\nLast-Event-ID: 2\r\n", 204),
        ("&lastEventId=1795348800000-1", "", 204),
        ("&evs_last_event_id=x", "", 204),
        ("&lastEventI%64=x", "", 204),
        ("&lastEventId=&evs_last_event_id=x", "", 204),
        ("", "Range: bytes=148-\r\n", 204),
        ("", "Accept: text/plain\r\nRange: bytes=148-\r\n", 204),
        ("", "", 200),
        ("", "Last-Event-ID:\r\n", 200),
        ("", "Last-Event-ID: \t \r\n", 200),
        ("&lastEventId=", "", 200),
        ("&lastEventId", "", 200),
        ("&evs_last_event_id=&lastEventId=", "Last-Event-ID:\r\n", 200),
        ("&lasteventid=1", "", 400),
        ("&Range=1", "", 400),
    ] {
        let before = runs(&server);
        let target = format!("/run?command=true{query}");
        let response = server.get(&target, fields);
        assert_eq!(response.status, status, "{query} {fields} {}", shown(&response));
        let posted = post(&server, &target, fields, "");
        assert_eq!(posted.status, status, "{query} {fields} {}", shown(&posted));
        if status == 204 {
            assert_eq!(response.field("content-length"), None);
            assert!(response.field("date").is_some());
            if !fields.is_empty() {
                let form = post(&server, "/run", fields, "command=true");
                assert_eq!(form.status, 204, "{fields}");
            }
        }
        let started = if status == 200 { 2 } else { 0 };
        assert_eq!(runs(&server), before + started, "{query} {fields}");
    }
}

#[test]
fn plain_text_is_the_output_and_a_trailer() {
    let server = Server::start(&[]);
    let plain = |command: &str| server.get(&run_target(command), "Accept: text/plain\r\n");
    let response =
        plain("sh -c 'printf \"a\\377\\0\"; sleep 0.2; printf b >&2; sleep 0.2; printf c; exit 4'");
    assert_eq!(response.content, b"a\xff\0bc");
    let media_type = response.field("content-type");
    assert_eq!(media_type, Some("text/plain; charset=utf-8"));
    // Said beforehand, since a client may drop what was not.
    let announced = response.field("trailer").unwrap().to_ascii_lowercase();
    let announced: Vec<&str> = announced.split(',').map(str::trim).collect();
    assert!(announced.contains(&"exit-code") && announced.contains(&"exit-signal"));
    assert_eq!(response.trailers, [("exit-code".into(), "4".into())]);
    let killed = plain("sh -c 'kill -TERM $$'");
    assert_eq!(killed.trailers, [("exit-signal".into(), "15".into())]);
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    assert!(plain("seq 1 100000").text() == expected);
}

#[test]
fn accept_is_compared_by_media_type() {
    let server = Server::start(&[]);
    for (accept, is_plain) in [
        ("text/plain", true),
        ("TEXT/Plain;q=0.5", true),
        ("text/plain; charset=utf-8", true),
        ("text/html, text/plain", true),
        ("text/html\r\nAccept: text/plain", true),
        ("text/event-stream;q=0, text/plain", true),
        ("text/plain, */*;q=0", true),
        ("*/*", false),
        ("", false),
        ("text/plainer", false),
        ("xtext/plain", false),
        ("text/event-stream", false),
        ("TEXT/EVENT-STREAM", false),
        ("text/plain, text/event-stream", false),
        ("text/event-stream;q=0.1\r\nAccept: text/plain", false),
        // As axios says it.
        ("application/json, text/plain, */*", false),
        ("text/plain;q=0", false),
        ("text/plain; q=0", false),
        ("text/plain;q=0.000", false),
        ("text/plain;Q=0", false),
        ("text/plain;q=0, text/html", false),
    ] {
        let response = server.get("/run?command=true", &format!("Accept: {accept}\r\n"));
        let expected = if is_plain { "text/plain; charset=utf-8" } else { "text/event-stream" };
        assert_eq!(response.field("content-type"), Some(expected), "{accept}");
    }
    let none = server.get("/run?command=true", "");
    assert_eq!(none.field("content-type"), Some("text/event-stream"));
}

#[test]
fn ureq_reads_a_stream() {
    let server = Server::start(&[]);
    let url = format!("http://{}/run?command=echo+hi", server.address);
    let mut response = ureq::get(&url).call().unwrap();
    let media_type = response.headers().get("content-type").unwrap();
    assert_eq!(media_type, "text/event-stream");
    let events = parse_events(response.body_mut().read_to_string().unwrap().as_bytes());
    assert_eq!(output(&events, "stdout"), "hi\n");
    assert_eq!(outcome(&events), "exited:0");
    let content: String = (0..50_000).map(|number| format!("{number}\n")).collect();
    let url = format!("http://{}/run?command=cat", server.address);
    let mut response =
        ureq::post(url).header("Accept", "text/plain").send(content.as_str()).unwrap();
    assert!(response.body_mut().read_to_string().unwrap() == content);
}
