//! Section 2: what is a request, and how each refusal looks.

use crate::support::*;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// A request line and fields with `HOST` for the server's address.
fn ask(server: &Server, request: &str) -> Response {
    server.send(request.replace("HOST", &server.address))
}

#[test]
fn heads_by_the_grammar() {
    let server = Server::start(&[]);
    let long_line = format!("GET /{} HTTP/1.1\r\nHost: HOST\r\n\r\n", "x".repeat(8 << 10));
    let fitting_line =
        format!("GET /{} HTTP/1.1\r\nHost: HOST\r\n\r\n", "x".repeat((8 << 10) - 14));
    let fields = |count: usize| {
        format!("GET / HTTP/1.1\r\nHost: HOST\r\n{}\r\n", "A: b\r\n".repeat(count - 1))
    };
    let large_head = format!("GET / HTTP/1.1\r\nHost: HOST\r\nA: {}\r\n\r\n", "x".repeat(16 << 10));
    let (many, enough) = (fields(101), fields(100));
    let table: &[(&str, u16)] = &[
        ("GET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 200),
        ("\r\nGET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 200),
        ("GET / HTTP/1.0\r\n\r\n", 200),
        ("GET / HTTP/1.7\r\nHost: HOST\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\nhOST: \t HOST \t\r\nEmpty:\r\n\r\n", 200),
        ("GET http://HOST/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 200),
        ("GET HTTP://HOST HTTP/1.1\r\nHost: HOST\r\n\r\n", 200),
        ("GET http://HOST/none HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("OPTIONS * HTTP/1.1\r\nHost: HOST\r\n\r\n", 204),
        ("OPTIONS http://HOST HTTP/1.1\r\nHost: HOST\r\n\r\n", 204),
        ("\r\n\r\nGET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET /\r\nHost: HOST\r\n\r\n", 400),
        ("GET  / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1.1 \r\nHost: HOST\r\n\r\n", 400),
        (" GET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET\t/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("G(T / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET run HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET * HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET HOST HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET https://HOST/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET /\u{e9} HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET /\u{1} HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / http/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/01.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/2.0\r\nHost: HOST\r\n\r\n", 505),
        ("GET / HTTP/0.9\r\n\r\n", 505),
        ("GET / HTTP/1.1\nHost: HOST\n\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: b\rc\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: b\r\n c\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA : b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\n: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: \u{0}\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: \u{7f}\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: \u{e9}\r\n\r\n", 200),
        (" \r\nGET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\nHost: HOST\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: user@HOST\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOSTx\r\n\r\n", 400),
        (&long_line, 414),
        (&fitting_line, 404),
        (&large_head, 431),
        (&many, 431),
        (&enough, 200),
        ("GET /none HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("GET /run/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("PUT /run HTTP/1.1\r\nHost: HOST\r\n\r\n", 501),
        ("CONNECT HOST HTTP/1.1\r\nHost: HOST\r\n\r\n", 501),
        ("get / HTTP/1.1\r\nHost: HOST\r\n\r\n", 501),
        ("BREW /none HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("POST / HTTP/1.1\r\nHost: HOST\r\n\r\n", 405),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nExpect: magic\r\n\r\n", 417),
        ("GET / HTTP/1.0\r\nHost: HOST\r\nExpect: magic\r\n\r\n", 200),
    ];
    for (request, status) in table {
        let response = ask(&server, request);
        assert_eq!(response.status, *status, "{request:?} {response:?}");
        assert!(response.field("date").is_some_and(|date| date.ends_with(" GMT")), "{response:?}");
        assert_eq!(response.field("x-content-type-options"), Some("nosniff"));
        if *status >= 400 {
            assert_eq!(
                (response.text().lines().count(), response.field("content-type")),
                (1, Some("text/plain; charset=utf-8"))
            );
        }
    }
}

#[test]
fn framing_of_content() {
    let server = Server::start(&[]);
    let table: &[(&str, u16)] = &[
        ("Content-Length: 3\r\n\r\nabc", 200),
        ("Content-Length: 0\r\n\r\n", 200),
        ("Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200),
        ("Transfer-Encoding: Chunked\r\n\r\n03;x=\"y\"\r\nabc\r\n0\r\nTrailer: x\r\n\r\n", 200),
        ("Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
        ("Content-Length: 3, 3\r\n\r\nabc", 400),
        ("Content-Length: +3\r\n\r\nabc", 400),
        ("Content-Length: -3\r\n\r\nabc", 400),
        ("Content-Length: 0x3\r\n\r\nabc", 400),
        ("Content-Length: 3 3\r\n\r\nabc", 400),
        ("Content-Length:\r\n\r\nabc", 400),
        ("Content-Length: 99999999999999999999\r\n\r\nabc", 400),
        ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        ("Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n", 501),
        ("Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        ("Transfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        ("Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n", 400),
        ("Transfer-Encoding: chunked\r\n\r\n3 3\r\nabc\r\n", 400),
        ("Transfer-Encoding: chunked\r\n\r\n\r\n", 400),
        ("Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n", 400),
    ];
    for (rest, status) in table {
        let response =
            ask(&server, &format!("POST /run?command=cat HTTP/1.1\r\nHost: HOST\r\n{rest}"));
        assert_eq!(response.status, *status, "{rest:?} {response:?}");
        if *status == 200 {
            let expected =
                if rest.ends_with("\r\n\r\n") && !rest.contains("abc") { "" } else { "abc" };
            assert_eq!(output(&response.events(), "stdout"), expected, "{rest:?}");
        }
    }
    let old = ask(
        &server,
        "POST /run?command=cat HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    );
    assert_eq!(old.status, 400);
}

#[test]
fn commands_of_a_query() {
    let server = Server::start(&[]);
    let table: &[(&str, &str)] = &[
        ("echo+a++b", "a b\n"),
        ("echo%20%27a%20%20b%27", "a  b\n"),
        ("%65cho+%2B", "+\n"),
        ("printf+%25s+%22a%5C%22b%22", "a\\\"b"),
        ("echo+a&other=x&x=%zz", "a\n"),
        ("echo+%2441*", "$41*\n"),
    ];
    for (query, expected) in table {
        let response = server.get(&format!("/run?command={query}"), "");
        assert_eq!(
            response.events()[1].data,
            format!(
                "{{\"type\":\"stdout\",\"out\":\"{}\"}}",
                expected.replace('\\', "").replace('"', "\\\"").replace('\n', "\\n")
            ),
            "{query}"
        );
    }
    assert_eq!(output(&server.get("/run?%63ommand=echo+x", "").events(), "stdout"), "x\n");
    for query in [
        "",
        "?",
        "?command",
        "?command=",
        "?command=+%09",
        "?command=%zz",
        "?command=%f",
        "?command=%",
        "?command=a&command=b",
        "?command='a",
        "?command=%22a",
        "?command=a%00b",
        "?commands=a",
    ] {
        let response = server.get(&format!("/run{query}"), "");
        assert_eq!((response.status, response.text().lines().count()), (400, 1), "{query}");
    }
    assert!(server.children().is_empty());
}

#[test]
fn words_are_bytes() {
    let server = Server::start(&[]);
    let response = server.get("/run?command=printf+%25s+%ff%e9", "Accept: text/plain\r\n");
    assert_eq!(response.content, b"\xff\xe9");
}

#[test]
fn forms() {
    let server = Server::start(&[]);
    let post = |content: &str, fields: &str| {
        let length = content.len();
        ask(
            &server,
            &format!(
                "POST /run HTTP/1.1\r\nHost: HOST\r\nContent-Length: {length}\r\n{fields}\r\n{content}"
            ),
        )
    };
    assert_eq!(output(&post("command=echo+a%26b&x=y", "").events(), "stdout"), "a&b\n");
    let padding = "x".repeat((64 << 10) - "command=true&".len());
    assert_eq!(outcome(&post(&format!("command=true&{padding}"), "").events()), "exited:0");
    assert_eq!(post(&format!("command=true&{padding}x"), "").status, 413);
    assert_eq!(post("", "").status, 400);
    assert_eq!(post("x=y", "").status, 400);
    assert_eq!(post("command=a&command=b", "").status, 400);
    let chunked = "POST /run HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ncommand=\r\n6\r\necho+c\r\n0\r\n\r\n";
    assert_eq!(output(&ask(&server, chunked).events(), "stdout"), "c\n");
    let too_much = format!(
        "POST /run HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\ncommand={}\r\n0\r\n\r\n",
        70_000 + 8,
        "x".repeat(70_000)
    );
    assert_eq!(ask(&server, &too_much).status, 413);
    let broken = "POST /run HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ncommand=\r\nzz\r\n";
    assert_eq!(ask(&server, broken).status, 400);
    let endless = "POST /run HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ncommand=\r\nffffffffffffffff\r\nx";
    assert_eq!(ask(&server, endless).status, 413);
    // What is in the content is no form where the query has the command.
    let query =
        "POST /run?command=cat HTTP/1.1\r\nHost: HOST\r\nContent-Length: 12\r\n\r\ncommand=echo";
    assert_eq!(output(&ask(&server, query).events(), "stdout"), "command=echo");
}

#[test]
fn head_and_options_run_nothing() {
    let folder = Folder::new();
    let server = Server::start(&[]);
    let target = run_target(&format!("touch {}", folder.path("file")));
    for (target, media_type) in [("/", "text/html; charset=utf-8"), (&target, "text/event-stream")]
    {
        let mut client = server.connect();
        client.write(format!("HEAD {target} HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
        let head = client.head();
        assert_eq!((head.status, head.field("content-type")), (200, Some(media_type)));
        // Nothing follows but the next answer.
        client.write(format!("GET /none HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
        assert_eq!(client.response().status, 404);
    }
    for (target, allow) in [
        ("/", "GET, HEAD, OPTIONS"),
        (&target, "GET, HEAD, POST, OPTIONS"),
        ("*", "GET, HEAD, POST, OPTIONS"),
    ] {
        let response =
            server.send(format!("OPTIONS {target} HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
        assert_eq!(
            (response.status, response.field("allow"), response.field("content-length")),
            (204, Some(allow), None)
        );
        assert!(!response.fields.iter().any(|(name, _)| name.starts_with("access-control-")));
    }
    let response = server.send(format!("POST / HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
    assert_eq!(response.field("allow"), Some("GET, HEAD, OPTIONS"));
    assert!(!folder.0.join("file").exists());
}

#[test]
fn a_connection_stays_open_unless_somebody_closes_it() {
    let server = Server::start(&[]);
    let mut client = server.connect();
    let host = format!("Host: {}\r\n", server.address);
    // Refusals, content that nobody asked for, and commands, pipelined.
    client.write(format!("GET /none HTTP/1.1\r\n{host}\r\nPOST /none HTTP/1.1\r\n{host}Content-Length: 5\r\n\r\nGET /GET /run?command=echo+1 HTTP/1.1\r\n{host}\r\n"));
    client.write(format!("GET /run HTTP/1.1\r\n{host}\r\nPOST /run?command=cat HTTP/1.1\r\n{host}Content-Length: 1\r\n\r\n2"));
    client.write(format!("PUT / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\nGET /run?command=nonesuch HTTP/1.1\r\n{host}\r\n"));
    assert_eq!(client.response().status, 404);
    assert_eq!(client.response().status, 404);
    assert_eq!(output(&client.response().events(), "stdout"), "1\n");
    assert_eq!(client.response().status, 400);
    assert_eq!(output(&client.response().events(), "stdout"), "2");
    assert_eq!(client.response().status, 501);
    assert_eq!(outcome(&client.response().events()), "failed:127");
    client.write(format!("GET /run?command=true HTTP/1.1\r\n{host}Connection: x, Close\r\n\r\n"));
    let last = client.response();
    assert_eq!(
        (outcome(&last.events()).as_str(), last.field("connection")),
        ("exited:0", Some("close"))
    );
    assert!(client.is_closed());
    let mut old = server.connect();
    old.write("GET /run?command=echo+old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    let response = old.response();
    assert_eq!(
        (response.field("transfer-encoding"), response.field("connection")),
        (None, Some("close"))
    );
    assert_eq!(output(&response.events(), "stdout"), "old\n");
}

#[test]
fn an_error_in_the_framing_closes() {
    let server = Server::start(&[]);
    for request in [
        "GET /\r\n\r\n",
        "GET / HTTP/3.0\r\n\r\n",
        "GET / HTTP/1.1\r\nA b\r\n\r\n",
        "POST /run?command=cat HTTP/1.1\r\nHost: HOST\r\nContent-Length: x\r\n\r\n",
    ] {
        let mut client = server.connect();
        client.write(format!("{request}GET / HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
        let response = client.response();
        assert_eq!(response.field("connection"), Some("close"), "{request:?}");
        assert!(client.is_closed(), "{request:?}");
    }
}

#[test]
fn a_head_that_trickles_has_ten_seconds() {
    let server = Server::start(&[]);
    let start = Instant::now();
    let mut client = server.connect();
    let (mut silent, mut writer) = (server.connect(), client.stream.get_ref().try_clone().unwrap());
    let trickle = std::thread::spawn(move || {
        use std::io::Write;
        for byte in b"GET / HTTP/1.1\r\nX: ".iter().chain(std::iter::repeat_n(&b'x', 1000)) {
            if writer.write_all(&[*byte]).is_err() || start.elapsed() > PATIENCE {
                return;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    assert_eq!(client.response().status, 408);
    assert_eq!(silent.response().status, 408);
    let took = start.elapsed().as_secs();
    assert!((9..20).contains(&took), "{took} s");
    client.stream.get_ref().shutdown(std::net::Shutdown::Both).unwrap();
    trickle.join().unwrap();
}

#[test]
fn a_refusal_arrives_whole_whatever_is_still_sent() {
    let server = Server::start(&[]);
    let flood = vec![b'x'; 3 << 20];
    for head in [
        "GET / HTTP/9.9\r\n",
        "POST /none HTTP/1.1\r\nHost: HOST\r\nContent-Length: 3145728\r\n\r\n",
        "POST /run HTTP/1.1\r\nHost: HOST\r\nContent-Length: 3145728\r\n\r\n",
        "POST /none HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n300000\r\n",
    ] {
        let mut client = server.connect();
        client.write(head.replace("HOST", &server.address));
        client.write(&flood);
        let response = client.response();
        assert!(
            response.status >= 400 && response.complete && response.text().ends_with('\n'),
            "{response:?}"
        );
        client.half_close();
        assert!(client.is_closed());
    }
}

#[test]
fn expect_is_answered_once_the_request_is_accepted() {
    let server = Server::start(&[]);
    let head = |target: &str| {
        format!(
            "POST {target} HTTP/1.1\r\nHost: {}\r\nContent-Length: 3\r\nExpect: 100-Continue\r\n\r\n",
            server.address
        )
    };
    let mut client = server.connect();
    client.write(head("/run?command=cat"));
    assert_eq!(client.head().status, 100);
    client.started();
    client.write("abc");
    assert_eq!(output(&client.rest(), "stdout"), "abc");
    // A form is accepted before its command is known; what is refused is never asked for.
    let mut client = server.connect();
    client.write(head("/run").replace("Content-Length: 3", "Content-Length: 14"));
    assert_eq!(client.head().status, 100);
    client.write("command=echo+f");
    assert_eq!(output(&client.response().events(), "stdout"), "f\n");
    for (target, status) in [("/none", 404), ("/run?command=", 400), ("/", 405)] {
        let mut client = server.connect();
        client.write(head(target));
        let response = client.response();
        assert_eq!(
            (response.status, response.field("connection")),
            (status, Some("close")),
            "{target}"
        );
        client.half_close();
        assert!(client.is_closed());
    }
}

#[test]
fn content_is_streamed_to_the_command_as_it_comes() {
    let server = Server::start(&[]);
    let (mut client, _) = server.begin_post("cat", "Transfer-Encoding: chunked\r\n\r\n");
    for word in ["one", "two", "six"] {
        client.write(format!("3\r\n{word}\r\n"));
        client.read_until(word);
    }
    client.write("0\r\n\r\n");
    assert_eq!(outcome(&client.rest()), "exited:0");
    // The connection goes on after content that the command did not read.
    let content = "x".repeat(300_000);
    client.write(format!(
        "POST /run?command=true HTTP/1.1\r\nHost: {}\r\nContent-Length: 300000\r\n\r\n{content}",
        server.address
    ));
    assert_eq!(outcome(&client.response().events()), "exited:0");
    client
        .write(format!("GET /run?command=echo+next HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
    assert_eq!(output(&client.response().events(), "stdout"), "next\n");
}

#[test]
fn content_that_the_command_does_not_want_is_passed_over() {
    let server = Server::start(&[]);
    let command = "sh -c 'exec <&-; echo ready; exec sleep 1000'";
    let (mut client, _) = server.begin_post(command, "Transfer-Encoding: chunked\r\n\r\n");
    client.read_until("ready");
    let stream = client.stream.get_mut();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let start = Instant::now();
    for _ in 0..80 {
        stream.write_all("1\r\nx\r\n".repeat(10_000).as_bytes()).unwrap();
    }
    assert!(start.elapsed() < PATIENCE);
}

/// A head has ten seconds to arrive; what a command is fed has all the time in the world.
#[test]
fn content_may_pause_for_longer_than_a_head_may_take() {
    let server = Server::start(&[]);
    let (mut client, _) = server.begin_post("cat", "Content-Length: 6\r\n\r\none");
    client.read_until("one");
    std::thread::sleep(Duration::from_millis(11_500));
    client.write("two");
    let events = client.rest();
    assert_eq!((output(&events, "stdout"), outcome(&events)), ("two".into(), "exited:0".into()));
}

#[test]
fn a_command_that_reads_slowly_slows_its_client() {
    let server = Server::start(&[]);
    let (mut client, pid) = server.begin_post("sleep 1000", "Content-Length: 100000000\r\n\r\n");
    client.stream.get_ref().set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let chunk = vec![b'x'; 1 << 20];
    let mut sent = 0;
    while std::io::Write::write_all(client.stream.get_mut(), &chunk).is_ok() {
        sent += 1;
        assert!(sent < 90, "the server takes it all");
    }
    drop(client);
    is_gone(pid);
}

#[test]
fn content_may_come_after_its_command_has_ended() {
    let server = Server::start(&[]);
    let begin = |connection: &str| {
        let mut client = server.connect();
        let fields = format!("Host: {}\r\n{connection}", server.address);
        client.write(format!(
            "POST /run?command=head+-c+1 HTTP/1.1\r\n{fields}Content-Length: 10\r\n\r\n123"
        ));
        assert_eq!(output(&client.response().events(), "stdout"), "1");
        client
    };
    // It is read to its end, since the next request comes after it.
    let mut client = begin("");
    let next = format!("GET /none HTTP/1.1\r\nHost: {}\r\n\r\n", server.address);
    client.write(format!("4567890{next}"));
    assert_eq!(client.response().status, 404);
    // Where no request follows, nobody waits for it.
    let start = Instant::now();
    assert!(begin("Connection: close\r\n").is_closed());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn content_that_breaks_off_ends_the_command() {
    let server = Server::start(&[]);
    let rest = server.at_rest();
    for (framing, part) in [
        ("Content-Length: 10", "abc"),
        ("Transfer-Encoding: chunked", "5\r\nabc"),
        ("Transfer-Encoding: chunked", "3\r\nabc\r\nzz\r\n"),
        ("Transfer-Encoding: chunked", "3\r\nabcd\r\n"),
    ] {
        let (mut client, _) = server.begin_post("cat", &format!("{framing}\r\n\r\n"));
        client.write(part);
        client.read_until("abc");
        client.half_close();
        let events = client.rest();
        assert!(events.iter().any(|event| event.event == "err"), "{events:?}");
        outcome(&events);
        assert!(client.is_closed());
    }
    server.comes_to_rest(rest);
}

/// Bytes flipped and requests cut, by a fixed seed: each is answered or closed, and leaves nothing behind.
#[test]
fn mutilated_requests_do_no_harm() {
    let server = Server::start(&[]);
    server.run("true");
    let rest = server.at_rest();
    let whole = format!(
        "POST /run?command=true HTTP/1.1\r\nHost: {}\r\nTransfer-Encoding: chunked\r\n\r\n\
        5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: {0}\r\nConnection: close\r\n\r\n",
        server.address
    );
    let mut numbers = Numbers(0x9e37_79b9);
    let mut random = |below: usize| numbers.below(below as u64) as usize;
    for round in 0..400 {
        let mut bytes = whole.clone().into_bytes();
        for _ in 0..1 + round % 3 {
            let place = random(bytes.len());
            bytes[place] ^= 1 << random(8);
        }
        bytes.truncate(if round % 4 == 0 { random(bytes.len()) } else { bytes.len() });
        let mut client = server.connect();
        client.write(&bytes);
        client.half_close();
        let mut answer = Vec::new();
        client.stream.read_to_end(&mut answer).unwrap_or_else(|why| panic!("{why}: {bytes:?}"));
        let begins = answer.starts_with(b"HTTP/1.1 ");
        assert!(begins || answer.is_empty() && round % 4 == 0, "{bytes:?}: {answer:?}");
    }
    assert_eq!(outcome(&server.run("true")), "exited:0");
    server.comes_to_rest(rest);
    let log = server.log();
    assert!(log.lines().all(|line| line.starts_with("20") && line.contains("Z ")), "{log}");
}
