//! Section 7: the log, and a stderr that takes nothing.

use crate::support::*;
use std::process::Command;
use std::time::Duration;

/// The value of `key=` in a log line, quotes and escapes as they are.
fn value<'a>(line: &'a str, key: &str) -> &'a str {
    let (_, rest) =
        line.split_once(&format!(" {key}=")).unwrap_or_else(|| panic!("no {key} in {line}"));
    if !rest.starts_with('"') {
        return rest.split(' ').next().unwrap();
    }
    let mut escaped = false;
    let end = rest[1..].find(|character| match character {
        _ if std::mem::take(&mut escaped) => false,
        '\\' => {
            escaped = true;
            false
        }
        _ => character == '"',
    });
    &rest[..end.unwrap() + 2]
}

fn utc_seconds() -> String {
    let mut command = Command::new("date");
    let mut output = command.args(["-u", "+%Y-%m-%dT%H:%M:%S"]).output().unwrap().stdout;
    output.pop();
    String::from_utf8(output).unwrap()
}

/// A time, a happening, then `key=value` where a value is quoted or has no blank: whatever a client has sent.
fn is_of_one_form(line: &str) {
    let (time, rest) = line.split_once(' ').unwrap();
    let shape: String = time
        .chars()
        .map(|character| match character {
            '0'..='9' => '0',
            other => other,
        })
        .collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000Z", "{line}");
    assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line:?}");
    let (happening, mut rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let known = "listen run exit refuse stdout stderr shutdown lost";
    assert!(known.split(' ').any(|word| word == happening), "{line}");
    while !rest.is_empty() {
        let (key, _) = rest.split_once('=').unwrap_or_else(|| panic!("{line}"));
        let is_key = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        assert!(!key.is_empty() && key.bytes().all(is_key), "{line}");
        let length = key.len() + 1 + value(&format!(" {rest}"), key).len();
        rest = rest[length..].strip_prefix(' ').unwrap_or_else(|| {
            assert_eq!(rest.len(), length, "{line}");
            ""
        });
    }
}

#[test]
fn happenings_are_told_in_lines_of_one_form() {
    let before = utc_seconds();
    let server = Server::start(&[]);
    let client = server.connect();
    let peer = client.stream.get_ref().local_addr().unwrap();
    let mut client = client;
    client.write(format!(
        "GET /run?command=sh+-c+'echo+hello;echo+no+>%262;exit+2' HTTP/1.1\r\nHost: {}\r\n\r\n",
        server.address
    ));
    let events = client.response().events();
    let pid = events[0].number("pid");
    let line = server.logged(&["Z run ", &format!(" peer={peer} pid={pid} ")]);
    assert_eq!(value(&line, "command"), "\"sh -c 'echo hello;echo no >&2;exit 2'\"");
    let line = server.logged(&["Z exit ", &format!(" peer={peer} pid={pid} ")]);
    assert!(
        line.contains(" out=exited code=2 ms=") && line.ends_with(" stdout_bytes=6 stderr_bytes=3"),
        "{line}"
    );
    let ms: i64 = value(&line, "ms").parse().unwrap();
    assert_eq!(ms, events.last().unwrap().number("ms"));
    assert_eq!(outcome(&server.run("sh -c 'kill -9 $$'")), "killed:9".to_string());
    assert!(server.logged(&["Z exit ", "out=killed"]).contains("signal=9"));
    assert_eq!(outcome(&server.run("nonesuch")), "failed:127");
    server.logged(&["Z exit ", "out=failed", "code=127"]);
    let target = "/run?command=echo+hidden";
    server.get(target, "Origin: https://evil.example\r\n");
    let line = server.logged(&["Z refuse peer=127.0.0.1:", "status=403"]);
    assert_eq!(value(&line, "target"), format!("\"{target}\""));
    assert!(value(&line, "why").len() > 5, "{line}");
    server.signal("TERM");
    server.logged(&["Z shutdown"]);
    let after = utc_seconds();
    for line in server.log().lines() {
        is_of_one_form(line);
        let time = &line[..before.len()];
        assert!(before.as_str() <= time && time <= after.as_str(), "{line}");
    }
    // Without --verbose the output is nobody's business.
    assert!(!server.log().contains("Z stdout "), "{}", server.log());
}

/// Everything that can come from outside, in every place where it comes.
#[test]
fn lines_cannot_be_forged_nor_reach_a_terminal() {
    let server = Server::start(&["--verbose", "--allow-origin", "https://ops.example"]);
    let forged = "\n2026-01-01T00:00:00.000Z shutdown";
    let texts = [
        format!("a{forged}"),
        format!("a\" {forged}\""),
        "a\" why=\"none".to_string(),
        "a\\\" why=none".to_string(),
        "\\".to_string(),
        "\u{1b}[31m\u{7}\u{7f}\r\u{0b}".to_string(),
        "\u{9b}31m\u{85}\u{2028}\u{202e}é\u{1f600}".to_string(),
    ];
    let mut count = 0;
    for text in &texts {
        let single = format!("'{text}'");
        // A word, a program, a command that is wrong, and output on both pipes.
        server.get(&run_target(&format!("true {single}")), "");
        server.get(&run_target(&single), "");
        server.get(&run_target(&format!("'{text}")), "");
        server.get(&run_target(&format!("printf %s {single}")), "");
        server.get(&run_target(&format!("sh -c 'printf %s \"$1\" >&2' sh {single}")), "");
        // What a head can hold of it.
        let field: String = text.replace(['\n', '\r'], " ");
        for fields in [
            format!("Origin: {field}\r\n"),
            format!("User-Agent: Mozilla/{field}\r\n"),
            format!("Sec-Fetch-Site: {field}\r\n"),
        ] {
            server.get("/run?command=true", &fields);
        }
        server.send(format!("GET / HTTP/1.1\r\nHost: {field}\r\n\r\n"));
        server.send(format!("GET /{text} HTTP/1.1\r\nHost: x\r\n\r\n"));
        server.send(format!("{text} / HTTP/1.1\r\nHost: x\r\n\r\n"));
        let form = format!("command={}", percent_encode(format!("'{text}").as_bytes()));
        server.send(format!(
            "POST /run HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n{form}",
            server.address,
            form.len()
        ));
        count += 1;
    }
    server.get(&run_target("printf '\\377\\200\\0\\1last'"), "");
    server.logged(&["Z stdout ", "last"]);
    server.logged(&["Z stdout ", "\"a\\\" why=\\\"none\""]);
    server.logged(&["Z stderr "]);
    wait_for("the last form to be logged", || server.log().matches("status=400").count() >= count);
    let log = server.log();
    for line in log.lines() {
        is_of_one_form(line);
        assert_ne!(line.split(' ').nth(1), Some("shutdown"), "{line}");
    }
}

/// Wherever the command stood, who reads the log sees what was asked for.
#[test]
fn a_refusal_tells_the_command() {
    let server = Server::start(&["--allow", "sleep 1000", "--max-commands", "1"]);
    let (_client, _) = server.begin("sleep 1000");
    let form = |form: &str, fields: &str| {
        let (host, length) = (&server.address, form.len());
        server.send(format!(
            "POST /run HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n{fields}\r\n{form}"
        ))
    };
    for (number, (content, status)) in [
        ("command=rm+-r+%2Fform", 403),
        ("command=rm+'form", 400),
        ("command=rm+form&other=field", 400),
        ("command=rm+form&command=rm+form", 400),
        ("command=rm+form%00", 400),
        ("command=sleep+1000", 503),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(form(content, "").status, status, "{content}");
        let refusals = || {
            let log = server.log();
            let lines = log.lines().filter(|line| line.contains("Z refuse "));
            lines.map(str::to_string).collect::<Vec<_>>()
        };
        wait_for("the refusal", || refusals().len() > number);
        let line = &refusals()[number];
        assert!(line.contains(&format!(" status={status} ")), "{line}");
        let expected = if status == 503 { "sleep" } else { "rm" };
        assert!(line.contains(expected), "{content}: {line}");
        if status != 503 {
            assert!(line.contains("form"), "{content}: {line}");
        }
    }
    // In the query it is there before anything is decided.
    for (target, fields, status) in [
        ("/run?command=rm+query1", "", 403),
        ("/run?command=rm+query2", "Origin: https://evil.example\r\n", 403),
        ("/run?command=rm+'query3", "", 400),
        ("/run?command=rm&x=query4", "", 400),
    ] {
        assert_eq!(server.get(target, fields).status, status);
        let line = server.logged(&["Z refuse ", &target[target.len() - 6..]]);
        assert!(line.contains("rm"), "{line}");
    }
}

/// A distinct letter in every place, so that no part of it is there by chance.
const TOKEN: &str = "Q7ZxK9wJ4VyT8bGh";

/// No four letters of the token in a row.
fn has_no_token(log: &str) {
    for start in 0..TOKEN.len() - 3 {
        let part = &TOKEN[start..start + 4];
        if let Some(line) = log.lines().find(|line| line.contains(part)) {
            panic!("{part} in {line}");
        }
    }
}

#[test]
fn the_token_never_appears() {
    let folder = Folder::new();
    let file = folder.write("token", format!("{TOKEN}\n"));
    let server = Server::start(&["--verbose", "--token-file", &file]);
    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    for (target, fields) in [
        (format!("/run?command=echo+{TOKEN}"), &*bearer),
        (format!("/run?command=echo+{TOKEN}{TOKEN}+x{TOKEN}y"), &bearer),
        (format!("/run?command=sh+-c+'echo+{TOKEN}+>%262'"), &bearer),
        (format!("/run?command={TOKEN}"), &bearer),
        (format!("/run?command='{TOKEN}"), &bearer),
        (format!("/run?command=true&token={TOKEN}"), &bearer),
        (format!("/run?command=cat+{}", percent_encode(file.as_bytes())), &bearer),
        (format!("/{TOKEN}"), &bearer),
        (format!("/run?command=echo+{TOKEN}"), ""),
        (format!("/run?command=true&access_token={TOKEN}"), ""),
        (format!("/run?command=echo+{}", TOKEN.replace('Z', "%5A")), &bearer),
    ] {
        server.get(&target, fields);
    }
    let wrong = format!("Authorization: Bearer {TOKEN}x\r\n");
    assert_eq!(server.get("/run?command=true", &wrong).status, 401);
    let wrong = format!("Authorization: Basic {TOKEN}\r\n");
    assert_eq!(server.get("/run?command=true", &wrong).status, 401);
    let misplaced = format!("X-Token: {TOKEN}\r\nOrigin: http://{TOKEN}.example\r\n");
    server.get("/run?command=true", &misplaced);
    server.send(format!("GET / HTTP/1.1\r\nHost: {TOKEN}.example\r\n\r\n"));
    server.send(format!("{TOKEN} / HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    server.send(format!("GET / HTTP/1.1\r\nHost: localhost\r\n{TOKEN}\r\n\r\n"));
    server.send(format!(
        "POST /run HTTP/1.1\r\nHost: {0}\r\n{bearer}Content-Length: {1}\r\n\r\ncommand='{TOKEN}",
        server.address,
        "command='".len() + TOKEN.len()
    ));
    server.get("/last", &bearer);
    server.logged(&["target=\"/last\""]);
    has_no_token(&server.log());
    assert!(server.log().contains("Z stdout "));
}

/// Text that is too long for a line is cut: not in the middle of a token that is then not known as one.
#[test]
fn no_part_of_the_token_appears_where_a_text_is_cut() {
    let folder = Folder::new();
    let file = folder.write("token", format!("{TOKEN}\n"));
    let server = Server::start(&["--verbose", "--token-file", &file]);
    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    let host = &server.address;
    // One connection: a refusal that was understood leaves it open.
    let mut client = server.connect();
    for padding in (0..6000).step_by(12) {
        let padding = "-".repeat(padding);
        client.write(format!("GET /{padding}{TOKEN}{TOKEN} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(client.response().status, 404);
    }
    // In escapes each byte takes more room.
    for padding in (0..2500).step_by(12) {
        let padding = "%1b".repeat(padding);
        client.write(format!(
            "GET /run?command='{padding}{TOKEN}{TOKEN} HTTP/1.1\r\nHost: {host}\r\n{bearer}\r\n"
        ));
        assert_eq!(client.response().status, 400);
    }
    // Output, of which each piece is one write.
    let script =
        "i=0; while [ $i -lt 5000 ]; do printf '%*s%s' $i '' $0$0; i=$((i+12)); sleep 0.002; done";
    let fields = format!("{bearer}Accept: text/plain\r\n");
    let command = format!("sh -c \"{}\" {TOKEN}", script.replace('$', "\\$"));
    let response = server.get(&run_target(&command), &fields);
    assert_eq!(response.trailers, [("exit-code".to_string(), "0".to_string())]);
    // And more than one read brings.
    let command = format!("sh -c 'yes $0 | head -c 2000000' {TOKEN}");
    assert!(server.get(&run_target(&command), &fields).complete);
    server.get("/last", &bearer);
    server.logged(&["target=\"/last\""]);
    has_no_token(&server.log());
}

/// What the log's form escapes is not seen by one who looks for the token as it is.
#[test]
fn a_token_of_signs_never_appears() {
    let folder = Folder::new();
    let token = "Q7\"Z\\x'K9%w&J4";
    let file = folder.write("token", format!("{token}\n"));
    let server = Server::start(&["--verbose", "--token-file", &file]);
    let fields = format!("Authorization: Bearer {token}\r\n");
    let response =
        server.get(&run_target(&format!("cat {file} nonesuch-{}", "x".repeat(9))), &fields);
    assert_eq!(output(&response.events(), "stdout"), "Q7\\\"Z\\\\x'K9%w&J4\n");
    let word = token.replace('\\', "\\\\").replace('"', "\\\"");
    let events = server.get(&run_target(&format!("echo \"{word}\"")), &fields).events();
    assert_eq!(outcome(&events), "exited:0");
    // As a client writes it in a target.
    for name in ["token", "command"] {
        let target = format!("/run?{name}={}", percent_encode(token.as_bytes()));
        server.get(&target, "");
        // Beside what does not decode, in a target and in a form.
        server.get(&target.replace('?', "?%zz&"), "");
        let form = target.replace("/run?", "%zz&");
        let length = format!("Content-Length: {}", form.len());
        let head = format!("POST /run HTTP/1.1\r\nHost: {}\r\n{fields}{length}", server.address);
        assert_eq!(server.send(format!("{head}\r\n\r\n{form}")).status, 400);
    }
    server.get("/last", &fields);
    server.logged(&["target=\"/last\""]);
    let log = server.log();
    for part in ["Q7", "x'K9", "w&J4"] {
        assert!(!log.contains(part), "{part}: {log}");
    }
}

#[test]
fn every_piece_of_output_is_told_where_that_is_asked_for() {
    for option in ["-v", "--verbose"] {
        let server = Server::start(&[option]);
        let (mut client, pid) =
            server.begin("sh -c 'echo one; sleep 0.3; echo two >&2; sleep 0.3; printf three'");
        client.rest();
        for (source, text) in [("stdout", "one\\n"), ("stderr", "two\\n"), ("stdout", "three")] {
            let line = server.logged(&[&format!("Z {source} peer="), &format!("\"{text}\"")]);
            assert_eq!(value(&line, "pid"), pid.to_string());
        }
    }
}

unsafe extern "C" {
    fn setsockopt(socket: i32, level: i32, name: i32, value: *const [i32; 2], length: u32) -> i32;
}

/// Lets the end of a connection be a reset, at once.
fn will_reset(client: &Client) {
    use std::os::fd::AsRawFd;
    const SOL_SOCKET: i32 = 1;
    const SO_LINGER: i32 = 13;
    // `struct linger`: on, for no second.
    let (socket, linger) = (client.stream.get_ref().as_raw_fd(), [1, 0]);
    // SAFETY: the socket is open, and the pointer and the length are those of `linger`.
    let result = unsafe { setsockopt(socket, SOL_SOCKET, SO_LINGER, &linger, 8) };
    assert_eq!(result, 0);
}

/// The address is the one that the connection came from, whatever has become of it.
#[test]
fn the_peer_of_a_connection_that_was_reset() {
    let server = Server::start(&[]);
    let mut peers = Vec::new();
    for number in 0..200 {
        let mut client = server.connect();
        peers.push(client.stream.get_ref().local_addr().unwrap().to_string());
        will_reset(&client);
        client.write(format!("GET /{number} HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
    }
    assert_eq!(server.get("/last", "").status, 404);
    server.logged(&["target=\"/last\""]);
    // A reset may come before its request was read; then there is nothing to tell.
    let log = server.log();
    let refusals = log.lines().filter(|line| line.contains("Z refuse "));
    let refusals: Vec<_> = refusals.filter(|line| !line.contains("/last")).collect();
    assert!(refusals.len() > 20, "{log}");
    for line in refusals {
        let peer = value(line, "peer").to_string();
        assert!(peers.contains(&peer), "{line}");
    }
}

/// A server whose log goes into a pipe that is full, and that nobody reads.
fn stuck(fifo: &mut Fifo, waits: bool, options: &[&str]) -> Server {
    fifo.fill();
    let mut command = binary();
    command.args(["--listen", "127.0.0.1:0"]).args(options);
    Server::start_with_stderr(command, fifo.writer(waits))
}

#[test]
fn a_stderr_that_nobody_reads_holds_nothing_up() {
    at_once([true, false], |waits| {
        let (mut fifo, mut other) = (Fifo::new(), Fifo::new());
        let mut server = stuck(&mut fifo, waits, &["--grace", "0.5", "--verbose"]);
        for number in 0..40 {
            assert_eq!(server.get(&format!("/{number}"), "").status, 404);
        }
        assert_eq!(outcome(&server.run("echo x")), "exited:0");
        // More lines than anybody would keep.
        let events = server.run("sh -c 'i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done'");
        assert_eq!(outcome(&events), "exited:0");
        let (client, pid) = server.begin("sh -c 'sleep 1000 & wait'");
        drop(client);
        is_gone(pid);
        let (mut held, mut flood) = (server.begin("sleep 1000").0, server.begin("yes").0);
        flood.read_until("y");
        let before = server.processor_time();
        drop(flood);
        server.session_has(1);
        std::thread::sleep(Duration::from_secs(1));
        let spent = server.processor_time() - before;
        assert!(spent < 60, "it spins: {spent} ticks");
        let limited = stuck(&mut other, waits, &["--timeout", "0.5", "--grace", "0.5"]);
        let stubborn = "sh -c 'trap \"\" TERM; while :; do sleep 0.1; done'";
        assert_eq!(outcome(&limited.run("sleep 1000")), "timeout:15");
        assert_eq!(outcome(&limited.run(stubborn)), "timeout:9");
        server.signal("TERM");
        assert_eq!(outcome(&held.rest()), "shutdown:15");
        assert_eq!(server.exit_status().code(), Some(0));
        // And where the supervisor is killed.
        let mut limited = limited;
        limited.process.kill().unwrap();
        limited.process.wait().unwrap();
        limited.is_gone();
    });
}

/// The lines that came, and how many they say were dropped.
fn counted(lines: &[String]) -> (usize, usize) {
    let (mut came, mut dropped) = (0, 0);
    for line in lines {
        is_of_one_form(line);
        if line.contains("Z lost ") {
            dropped += value(line, "lines").parse::<usize>().unwrap();
        } else {
            came += 1;
        }
    }
    (came, dropped)
}

#[test]
fn lines_without_room_are_counted() {
    at_once([true, false], |waits| {
        let mut fifo = Fifo::new();
        let server = stuck(&mut fifo, waits, &[]);
        let host = &server.address;
        let refuse = |client: &mut Client| {
            client.write(format!("GET /none HTTP/1.1\r\nHost: {host}\r\n\r\n"));
            assert_eq!(client.response().status, 404);
        };
        let mut client = server.connect();
        // Each is a line, and `listen` was one.
        let mut told = 1;
        for _ in 0..5000 {
            refuse(&mut client);
            told += 1;
        }
        // The next that has room tells it.
        let mut counts = (0, 0);
        wait_for("all lines to be accounted for", || {
            refuse(&mut client);
            told += 1;
            std::thread::sleep(Duration::from_millis(20));
            counts = counted(&fifo.lines());
            counts.0 + counts.1 == told
        });
        assert!(counts.1 > 0);
        // From here on nothing is lost.
        for _ in 0..20 {
            refuse(&mut client);
            told += 1;
            wait_for("the line", || {
                let counts = counted(&fifo.lines());
                counts.0 + counts.1 == told
            });
        }
        assert_eq!(counted(&fifo.lines()).1, counts.1);
    });
}

#[test]
fn a_log_file_at_its_limit_holds_nothing_up() {
    let folder = Folder::new();
    let file = folder.write("log", "");
    // One block, of 512 bytes or of 1,024; commands have the limit too, and the signal's default.
    let mut command = binary_by_shell(&format!("ulimit -f 1; exec \"$@\" 2>>'{file}'"));
    command.args(["--listen", "127.0.0.1:0", "--grace", "1"]);
    let mut server = Server::start_with_stderr(command, std::process::Stdio::null());
    for number in 0..50 {
        assert_eq!(server.get(&format!("/{number}"), "").status, 404);
    }
    assert_eq!(outcome(&server.run("echo x")), "exited:0");
    assert_eq!(outcome(&server.run("sh -c 'kill -XFSZ $$'")), "killed:25");
    let length = std::fs::metadata(&file).unwrap().len();
    assert!((256..=1024).contains(&length), "{length}");
    // Emptied, as by one who rotates it, it has room.
    std::fs::OpenOptions::new().write(true).truncate(true).open(&file).unwrap();
    let mut text = String::new();
    wait_for("what was lost to be told", || {
        assert_eq!(server.get("/none", "").status, 404);
        text = std::fs::read_to_string(&file).unwrap();
        text.contains("Z lost lines=")
    });
    let lost = text.lines().find(|line| line.contains("Z lost ")).unwrap();
    is_of_one_form(lost);
    assert!(value(lost, "lines").parse::<usize>().unwrap() > 20, "{text}");
    let (mut client, _) = server.begin("sleep 1000");
    server.signal("TERM");
    assert_eq!(outcome(&client.rest()), "shutdown:15");
    assert_eq!(server.exit_status().code(), Some(0));
}
