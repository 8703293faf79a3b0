//! Sections 3 and 4: events, ids, decoding, failures, heartbeats, plain text.

use crate::support::*;
use std::time::{Duration, Instant};

#[test]
fn the_head_and_start_come_at_once() {
    let server = Server::start(&[]);
    let mut client = server.connect();
    client
        .write(format!("GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
    let head = client.head();
    let expected = [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-cache"),
        ("connection", "keep-alive"),
        ("x-accel-buffering", "no"),
        ("transfer-encoding", "chunked"),
    ];
    for (name, value) in expected {
        assert_eq!(head.field(name), Some(value));
    }
    let events = parse_events(&client.chunk().unwrap());
    assert_eq!(events.len(), 1);
    assert!(is_alive(events[0].number("pid") as u32));
}

#[test]
fn ids_count_without_a_gap() {
    let server = Server::start(&[]);
    let events = server
        .run("sh -c 'echo a; echo b >&2; printf \"\\303\"; sleep 0.1; printf \"\\251\"; exit 3'");
    for (index, event) in events.iter().enumerate() {
        let (millis, number) = event.id.split_once('-').unwrap();
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
        assert!(now - millis.parse::<u128>().unwrap() < 60_000);
        assert_eq!(number, (index + 1).to_string());
    }
    let exit = events.last().unwrap();
    assert_eq!(
        (output(&events, "stdout").as_str(), output(&events, "stderr").as_str()),
        ("a\né", "b\n")
    );
    assert_eq!(
        (
            exit.number("code"),
            exit.number("signal"),
            exit.number("stdout_bytes"),
            exit.number("stderr_bytes")
        ),
        (3, -1, 4, 2)
    );
    assert!(exit.number("ms") >= 100);
    let form = exit.data.replace(&exit.number("ms").to_string(), "MS");
    assert_eq!(
        form,
        "{\"type\":\"exit\",\"out\":\"exited\",\"code\":3,\"signal\":null,\"ms\":MS,\"stdout_bytes\":4,\"stderr_bytes\":2}"
    );
}

#[test]
fn characters_split_between_reads_arrive_whole() {
    let server = Server::start(&[]);
    let bytes =
        "é€😀".bytes().map(|byte| format!("printf '\\{byte:o}'; sleep 0.02;")).collect::<String>();
    for redirection in ["", " >&2"] {
        let events = server.run(&format!("sh -c \"{{ {bytes} }}{redirection}\""));
        let source = if redirection.is_empty() { "stdout" } else { "stderr" };
        assert_eq!(output(&events, source), "é€😀", "{events:?}");
        assert_eq!(events.len(), 5, "{events:?}");
    }
    let events = server.run("printf 'a\\377\\342\\202b\\360\\237'");
    assert_eq!(output(&events, "stdout"), "a\u{fffd}\u{fffd}b\u{fffd}");
    assert_eq!(events.last().unwrap().number("stdout_bytes"), 7);
}

#[test]
fn output_comes_the_moment_it_is_there() {
    let folder = Folder::new();
    let gate = folder.path("gate");
    let server = Server::start(&[]);
    // The command waits for a file that is made only when its output has come.
    let (mut client, _) = server.begin(&format!(
        "sh -c 'printf no-line-end; while [ ! -e {gate} ]; do sleep 0.01; done; echo over'"
    ));
    client.read_until("no-line-end");
    folder.write("gate", "");
    assert_eq!(output(&client.rest(), "stdout"), "over\n");
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
    assert_eq!(
        (exit.number("stdout_bytes"), exit.number("stderr_bytes")),
        (stdout.len() as i64, stderr.len() as i64)
    );
    // Control characters take six bytes each.
    let events = server.run("head -c 1000000 /dev/zero");
    let escaped: usize = events
        .iter()
        .filter(|event| event.event == "stdout")
        .map(|event| event.out().matches("\\u0000").count())
        .sum();
    assert_eq!(escaped, 1_000_000);
}

#[test]
fn how_commands_end() {
    let folder = Folder::new();
    let no_interpreter = folder.write("no_interpreter", "#!/no/such/interpreter\n");
    let no_script = folder.write("no_script", "echo hi\n");
    for file in [&no_interpreter, &no_script] {
        assert!(std::process::Command::new("chmod").args(["+x", file]).status().unwrap().success());
    }
    let server = Server::start(&[]);
    let long = "x".repeat(5000);
    let table = [
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
        (&no_interpreter, "failed:126"),
        (&no_script, "failed:126"),
    ];
    for (command, expected) in table {
        let events = server.run(command);
        assert_eq!(outcome(&events), expected, "{command} {events:?}");
        let kinds: Vec<_> = events.iter().map(|event| event.event.as_str()).collect();
        assert_eq!(
            kinds,
            if expected.starts_with("failed") { ["err", "exit"] } else { ["start", "exit"] }
        );
    }
}

#[test]
fn a_timeout_is_told() {
    let server = Server::start(&["--timeout", "0.4"]);
    let start = Instant::now();
    let events = server.run("sh -c 'echo a; sleep 1000'");
    assert!(start.elapsed() >= Duration::from_millis(400));
    let kinds: Vec<_> = events.iter().map(|event| event.event.as_str()).collect();
    assert_eq!(
        (kinds, outcome(&events).as_str()),
        (vec!["start", "stdout", "err", "exit"], "timeout:15")
    );
    assert!(
        events[2].data.starts_with("{\"type\":\"error\",\"out\":\"")
            && events[2].data.contains("--timeout")
    );
    let stubborn = server.run("sh -c 'trap \"\" TERM; while :; do sleep 0.1; done'");
    assert_eq!(outcome(&stubborn), "timeout:9");
    let last_word =
        server.run("sh -c 'trap \"echo bye; exit 7\" TERM; while :; do sleep 0.05; done'");
    assert_eq!(
        (output(&last_word, "stdout").as_str(), outcome(&last_word).as_str()),
        ("bye\n", "timeout:7")
    );
    assert_eq!(outcome(&server.run("true")), "exited:0");
}

#[test]
fn silence_is_broken_by_a_comment() {
    let server = Server::start(&["--heartbeat", "0.3"]);
    let (mut client, _) = server.begin("sleep 1000");
    for _ in 0..3 {
        let start = Instant::now();
        assert_eq!(client.chunk().unwrap(), b":\n");
        assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    }
    let plain = server.get("/run?command=sleep+1", "Accept: text/plain\r\n");
    assert_eq!(plain.text(), "");
}

#[test]
fn a_reconnect_runs_nothing() {
    let folder = Folder::new();
    let server = Server::start(&[]);
    let target = run_target(&format!("touch {}", folder.path("file")));
    let response = server.get(&target, "Last-Event-ID: 1795348800000-1\r\n");
    assert_eq!((response.status, response.content.len()), (204, 0));
    assert_eq!(response.field("content-length"), None);
    assert!(!folder.0.join("file").exists());
    assert_eq!(outcome(&server.run(&format!("touch {}", folder.path("file")))), "exited:0");
    assert!(folder.0.join("file").exists());
}

#[test]
fn plain_text_is_the_output_and_a_trailer() {
    let server = Server::start(&[]);
    let plain = |command: &str| server.get(&run_target(command), "Accept: text/plain\r\n");
    let response =
        plain("sh -c 'printf \"a\\377\\0\"; sleep 0.2; printf b >&2; sleep 0.2; printf c; exit 4'");
    assert_eq!(response.content, b"a\xff\0bc");
    assert_eq!(
        (response.status, response.field("content-type")),
        (200, Some("text/plain; charset=utf-8"))
    );
    assert_eq!(response.field("trailer"), Some("Exit-Code, Exit-Signal"));
    assert_eq!(response.trailers, [("exit-code".to_string(), "4".to_string())]);
    assert_eq!(
        plain("sh -c 'kill -TERM $$'").trailers,
        [("exit-signal".to_string(), "15".to_string())]
    );
    assert_eq!((plain("nonesuch").status, plain("/etc/passwd").status), (404, 403));
    let bytes: Vec<u8> = plain("seq 1 100000").content;
    assert_eq!(
        bytes,
        (1..=100_000).map(|number| format!("{number}\n")).collect::<String>().into_bytes()
    );
    let old = server.send("GET /run?command=echo+x HTTP/1.0\r\nAccept: text/plain\r\n\r\n");
    assert_eq!((old.text(), old.field("trailer")), ("x\n", None));
}

#[test]
fn accept_is_compared_by_media_type() {
    let server = Server::start(&[]);
    for (accept, plain) in [
        ("text/plain", true),
        ("TEXT/Plain;q=0.5", true),
        ("text/html, text/plain", true),
        ("text/plain, */*", true),
        ("*/*", false),
        ("text/*", false),
        ("text/plainer", false),
        ("text/event-stream", false),
        ("text/plain, text/event-stream", false),
        ("text/event-stream;q=0.1\r\nAccept: text/plain", false),
    ] {
        let response = server.get("/run?command=true", &format!("Accept: {accept}\r\n"));
        let expected = if plain { "text/plain; charset=utf-8" } else { "text/event-stream" };
        assert_eq!(response.field("content-type"), Some(expected), "{accept}");
    }
}

#[test]
fn ureq_reads_a_stream() {
    let server = Server::start(&[]);
    let url = format!("http://{}/run?command=echo+hi", server.address);
    let mut response = ureq::get(&url).call().unwrap();
    assert_eq!(response.headers().get("content-type").unwrap(), "text/event-stream");
    let events = parse_events(response.body_mut().read_to_string().unwrap().as_bytes());
    assert_eq!(
        (output(&events, "stdout").as_str(), outcome(&events).as_str()),
        ("hi\n", "exited:0")
    );
    let content: String = (0..50_000).map(|number| format!("{number}\n")).collect();
    let post = ureq::post(format!("http://{}/run?command=cat", server.address))
        .header("Accept", "text/plain");
    assert_eq!(post.send(content.as_str()).unwrap().body_mut().read_to_string().unwrap(), content);
}
