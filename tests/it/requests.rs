//! Section 2: what is a request, what a command line says, and how each refusal looks.

use crate::support::*;
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A request with `HOST` in it for the server's address, on a connection of its own.
pub fn ask(server: &Server, request: &str) -> Response {
    server.send(request.replace("HOST", &server.address))
}

/// A POST of `content` with these fields.
pub fn post(server: &Server, target: &str, fields: &str, content: &str) -> Response {
    let length = content.len();
    ask(
        server,
        &format!(
            "POST {target} HTTP/1.1\r\nHost: HOST\r\nContent-Length: {length}\r\n{fields}\r\n{content}"
        ),
    )
}

/// As much of a response as can be read in a failed test's words.
pub fn shown(response: &Response) -> String {
    let content = &response.content[..response.content.len().min(500)];
    let content = String::from_utf8_lossy(content);
    format!("{} {:?} {content:?}", response.status, response.fields)
}

/// What every response bears.
fn is_dated(response: &Response) {
    let date = response.field("date").unwrap_or_default();
    assert!(date.len() == 29 && date.ends_with(" GMT"), "{}", shown(response));
    assert_eq!(response.field("x-content-type-options"), Some("nosniff"));
}

/// A refusal is one line of plain text that has `words` in it, and neither what a terminal obeys nor
/// what only a programmer reads.
pub fn is_refusal(response: &Response, status: u16, words: &[&str]) {
    assert_eq!(response.status, status, "{}", shown(response));
    is_dated(response);
    let media_type = response.field("content-type").unwrap_or_default();
    assert!(media_type.starts_with("text/plain"), "{}", shown(response));
    let text = response.text();
    let line = text.strip_suffix('\n').unwrap_or_else(|| panic!("{text}"));
    assert!(!line.contains(char::is_control), "{line:?}");
    assert!(line.len() > 10 && !line.contains("os error"), "{line:?}");
    for word in words {
        assert!(line.contains(word), "no {word:?} in {line:?}");
    }
}

/// How often a command was started so far; the log has a line for each.
pub fn runs(server: &Server) -> usize {
    // Lines are written behind everybody's back, but in order: with this one, all that went before have been.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let target = format!("/none?{}", COUNT.fetch_add(1, Ordering::SeqCst));
    assert_eq!(server.get(&target, "").status, 404);
    server.logged(&["refuse", &format!("target={target:?}")]);
    server.log().matches("Z run peer=").count()
}

#[test]
fn heads_by_the_grammar() {
    let server = Server::start(&[]);
    // Whether the line end counts is left open: the longest that fits in any case, and one more than that.
    let line = |length: usize| {
        let path = "x".repeat(length - "GET / HTTP/1.1".len());
        format!("GET /{path} HTTP/1.1\r\nHost: HOST\r\n\r\n")
    };
    let (fitting_line, long_line) = (line((8 << 10) - 2), line((8 << 10) + 1));
    let endless_line = format!("GET /{}", "x".repeat(9 << 10));
    let value = |length: usize| {
        format!("GET / HTTP/1.1\r\nHost: HOST\r\nA: {}\r\n\r\n", "x".repeat(length))
    };
    let (fitting_head, long_head) = (value((16 << 10) - 100), value(16 << 10));
    let endless_head = format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(17 << 10));
    let fields = |count: usize| {
        let others = "A: b\r\n".repeat(count - 1);
        format!("GET / HTTP/1.1\r\nHost: HOST\r\n{others}\r\n")
    };
    let (enough, many) = (fields(100), fields(101));
    let table: &[(&str, u16)] = &[
        ("GET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 200),
        ("\r\nGET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 200),
        ("GET / HTTP/1.0\r\n\r\n", 200),
        ("GET / HTTP/1.7\r\nHost: HOST\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\nhOST: \t HOST \t\r\nEmpty:\r\n\r\n", 200),
        ("GET /\r\nHost: HOST\r\n\r\n", 400),
        ("GET  / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1.1 \r\nHost: HOST\r\n\r\n", 400),
        (" GET / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET\t/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("G(T / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        (" / HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        // A target that is no path.
        ("GET run HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET * HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET HOST HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET http://HOST/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET https://HOST/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET ?command=true HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("OPTIONS * HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("CONNECT HOST HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET /\u{e9} HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET /\u{1} HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / http/1.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/01.1\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/2.0\r\nHost: HOST\r\n\r\n", 505),
        ("GET / HTTP/0.9\r\n\r\n", 505),
        // Line ends, folded and malformed fields.
        ("GET / HTTP/1.1\nHost: HOST\n\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: b\rc\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: b\r\n c\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: b\r\n\tc\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n Host: HOST\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA : b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\n: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: \u{0}\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: \u{7f}\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nA: \u{e9}\r\n\r\n", 200),
        // Exactly one Host.
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nhost: HOST\r\n\r\n", 400),
        // Limits.
        (&fitting_line, 404),
        (&long_line, 414),
        (&endless_line, 414),
        (&fitting_head, 200),
        (&long_head, 431),
        (&endless_head, 431),
        (&enough, 200),
        (&many, 431),
        // Paths and methods.
        ("GET /none HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("GET /run/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("GET /Run?command=true HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("GET /commands/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("BREW /none HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("PUT /run HTTP/1.1\r\nHost: HOST\r\n\r\n", 501),
        ("DELETE /run HTTP/1.1\r\nHost: HOST\r\n\r\n", 501),
        ("get / HTTP/1.1\r\nHost: HOST\r\n\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: HOST\r\n\r\n", 405),
        ("POST /commands HTTP/1.1\r\nHost: HOST\r\n\r\n", 405),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nExpect: magic\r\n\r\n", 417),
    ];
    for (request, status) in table {
        let response = ask(&server, request);
        assert_eq!(response.status, *status, "{request:?} {}", shown(&response));
        if *status < 400 {
            is_dated(&response);
        } else {
            is_refusal(&response, *status, &[]);
        }
    }
    // Malformed, or the name of another host.
    for host in ["", "a b", "user@HOST", "HOSTx", "127.0.0.1:x", "[::1", "a/b"] {
        let status = ask(&server, &format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).status;
        assert!([400, 421].contains(&status), "{host:?}: {status}");
    }
    assert_eq!(runs(&server), 0);
}

#[test]
fn framing_of_content() {
    let server = Server::start(&[]);
    let over = "Content-Length: 9223372036854775808\r\n\r\nabc";
    let table: &[(&str, u16)] = &[
        ("Content-Length: 3\r\n\r\nabc", 200),
        ("content-length: \t3 \r\n\r\nabc", 200),
        ("Content-Length: 9223372036854775807\r\n\r\nabc", 200),
        (over, 400),
        ("Content-Length: 18446744073709551615\r\n\r\nabc", 400),
        ("Content-Length: 18446744073709551619\r\n\r\nabc", 400),
        ("Content-Length: 99999999999999999999\r\n\r\nabc", 400),
        ("Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
        ("Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        ("Content-Length: 3, 3\r\n\r\nabc", 400),
        ("Content-Length: +3\r\n\r\nabc", 400),
        ("Content-Length: -3\r\n\r\nabc", 400),
        ("Content-Length: 0x3\r\n\r\nabc", 400),
        ("Content-Length: 3 3\r\n\r\nabc", 400),
        ("Content-Length: 3.0\r\n\r\nabc", 400),
        ("Content-Length:\r\n\r\nabc", 400),
    ];
    for (rest, status) in table {
        // It takes what the three bytes are, and ends whether or not more come.
        let line = "POST /run?command=head+-c+3 HTTP/1.1\r\nHost: HOST";
        let response = ask(&server, &format!("{line}\r\n{rest}"));
        assert_eq!(response.status, *status, "{rest:?} {}", shown(&response));
        if *status == 200 {
            assert_eq!(output(&response.events(), "stdout"), "abc", "{rest:?}");
        } else {
            is_refusal(&response, 400, &["Content-Length"]);
        }
        assert_eq!(response.field("connection"), Some("close"), "{rest:?}");
    }
    // Nothing is an end too.
    for rest in ["\r\n", "Content-Length: 0\r\n\r\n"] {
        let line = "POST /run?command=wc+-c HTTP/1.1\r\nHost: HOST";
        let response = ask(&server, &format!("{line}\r\n{rest}"));
        assert_eq!(output(&response.events(), "stdout"), "0\n", "{rest:?}");
    }
    assert_eq!(runs(&server), 5);
}

/// Content needs a length: no transfer coding, of whatever name, for whatever method, and nothing behind
/// it is taken for a request.
#[test]
fn a_transfer_coding_is_refused_in_any_form() {
    let server = Server::start(&[]);
    let next = "0\r\n\r\nGET /run?command=true HTTP/1.1\r\nHost: HOST\r\n\r\n";
    for (line, codings) in [
        ("POST /run?command=cat HTTP/1.1", "chunked"),
        ("POST /run?command=cat HTTP/1.1", "Chunked"),
        ("POST /run?command=cat HTTP/1.1", ""),
        ("POST /run?command=cat HTTP/1.1", "identity"),
        ("POST /run?command=cat HTTP/1.1", "gzip, chunked"),
        ("POST /run?command=cat HTTP/1.1", "xchunked"),
        ("POST /run?command=cat HTTP/1.1", "chunked\r\nTransfer-Encoding: chunked"),
        ("POST /run?command=cat HTTP/1.0", "chunked"),
        ("POST /run HTTP/1.1", "chunked"),
        ("GET /run?command=true HTTP/1.1", "chunked"),
        ("HEAD / HTTP/1.1", "chunked"),
        ("GET / HTTP/1.1", "chunked"),
        ("PUT / HTTP/1.1", "chunked"),
    ] {
        let mut client = server.connect();
        let request = format!("{line}\r\nHost: HOST\r\ntransfer-Encoding: {codings}\r\n\r\n{next}");
        client.write(request.replace("HOST", &server.address));
        let response = if line.starts_with("HEAD") {
            client.head()
        } else {
            let response = client.response();
            is_refusal(&response, 411, &["curl", "--data-binary @-"]);
            response
        };
        assert_eq!(response.status, 411, "{line} {codings}");
        assert_eq!(response.field("connection"), Some("close"), "{line}");
        assert!(client.is_closed(), "{line} {codings}");
    }
    // With a length beside it, it is an attempt at smuggling: refused by either name.
    for fields in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
    ] {
        let line = "POST /run?command=cat HTTP/1.1\r\nHost: HOST";
        let response = ask(&server, &format!("{line}\r\n{fields}\r\n\r\n{next}"));
        assert!([400, 411].contains(&response.status), "{}", shown(&response));
        assert_eq!(response.field("connection"), Some("close"));
    }
    assert_eq!(runs(&server), 0);
}

#[test]
fn command_lines_are_split_as_a_shell_does() {
    let server = Server::start(&[]);
    let words = |line: &[u8]| {
        let command = [b"printf '[%s]' ", line].concat();
        let target = format!("/run?command={}", percent_encode(&command));
        let response = server.get(&target, "Accept: text/plain\r\n");
        (response.status, response.content)
    };
    let table: &[(&[u8], &[u8])] = &[
        (b"a b", b"[a][b]"),
        (b"  a \t b  ", b"[a][b]"),
        (b"a\nb\n\nc\n", b"[a][b][c]"),
        (b"'a  b' \"c  d\"", b"[a  b][c  d]"),
        (b"'a\nb' \"c\nd\"", b"[a\nb][c\nd]"),
        (b"a'b'\"c\"d", b"[abcd]"),
        (b"'' \"\" a''", b"[][][a]"),
        (b"'\"' \"'\"", b"[\"][']"),
        (b"'a\\b' '\\'", b"[a\\b][\\]"),
        // In double quotes a backslash escapes four signs, and stands before all others.
        (b"\"\\\" \\\\ \\$ \\` \\a \\' \\ \"", b"[\" \\ $ ` \\a \\' \\ ]"),
        // Outside quotes it takes what follows as it is.
        (b"\\a\\ b \\\" \\' \\\\ \\$", b"[a b][\"]['][\\][$]"),
        // It joins lines, but for single quotes; at the very end it stands for itself.
        (b"a\\\nb", b"[ab]"),
        (b"a \\\n b", b"[a][b]"),
        (b"\"a\\\nb\"", b"[ab]"),
        (b"'a\\\nb'", b"[a\\\nb]"),
        (b"a\\\\\nb", b"[a\\][b]"),
        (b"a\\", b"[a\\]"),
        (b"a \\", b"[a][\\]"),
        // Nothing is expanded, and no sign ends the command.
        (
            b"$HOME ${HOME} $(id) `id` * ? [a] ~ {a,b} !1",
            b"[$HOME][${HOME}][$(id)][`id`][*][?][[a]][~][{a,b}][!1]",
        ),
        (b"a;b ; | & && || > < >> 2>&1 # x", b"[a;b][;][|][&][&&][||][>][<][>>][2>&1][#][x]"),
        // Words are bytes.
        (b"\xff\xe9 '\x80' \"\xc3\"", b"[\xff\xe9][\x80][\xc3]"),
        ("é 😀".as_bytes(), "[é][😀]".as_bytes()),
        (b"\x01\x0b\x0c\x7f", b"[\x01\x0b\x0c\x7f]"),
    ];
    for (line, expected) in table {
        let (status, content) = words(line);
        assert_eq!(
            (status, String::from_utf8_lossy(&content)),
            (200, String::from_utf8_lossy(expected)),
            "{:?}",
            String::from_utf8_lossy(line)
        );
    }
    for line in ["'", "\"", "a'b", "a\"b", "'a\"", "\"a\\\"", "\"a'", "a\0b", "'a\0b'"] {
        assert_eq!(words(line.as_bytes()).0, 400, "{line:?}");
    }
}

/// What the host's own shell makes of lines that hold nothing to be expanded.
#[test]
fn command_lines_are_split_as_the_host_s_shell_does() {
    let server = Server::start(&[]);
    let mut numbers = Numbers(0x5eed);
    let (mut split, mut refused) = (BTreeSet::new(), 0);
    for _ in 0..150 {
        let length = 1 + numbers.below(9);
        let line: String = (0..length)
            .map(|_| ["a", "b", " ", "\t", "'", "\"", "\\", "é"][numbers.below(8) as usize])
            .collect();
        let command = format!("printf '[%s]' {line}");
        let shell = Command::new("sh").args(["-c", &command]).output().unwrap();
        let response = server.get(&run_target(&command), "Accept: text/plain\r\n");
        if shell.status.success() {
            assert_eq!(response.status, 200, "{line:?} {}", shown(&response));
            let expected = String::from_utf8(shell.stdout).unwrap();
            assert_eq!(response.text(), expected, "{line:?}");
            split.insert(expected);
        } else {
            assert_eq!(response.status, 400, "{line:?} {}", shown(&response));
            refused += 1;
        }
    }
    assert!(split.len() > 30 && refused > 20, "{split:?} {refused}");
}

#[test]
fn commands_of_a_query() {
    let server = Server::start(&[]);
    for (query, expected) in [
        ("command=echo+a++b", "a b\n"),
        ("command=echo%20%27a%20%20b%27", "a  b\n"),
        ("command=%65cho+%2B%26%3D", "+&=\n"),
        // Decoded once, also where that leaves what looks encoded.
        ("command=echo+%2541+%252B", "%41 %2B\n"),
        ("%63ommand=echo+x", "x\n"),
        ("command=echo+a=b", "a=b\n"),
        ("command=echo+?", "?\n"),
    ] {
        let response = server.get(&format!("/run?{query}"), "");
        assert_eq!(output(&response.events(), "stdout"), expected, "{query}");
    }
    let started = runs(&server);
    // The way out is named wherever the caller may not know it.
    let table: &[(&str, &[&str])] = &[
        ("", &["command", "curl"]),
        ("?", &["command", "curl"]),
        ("?command", &["command"]),
        ("?command=", &["command"]),
        ("?command=+%09%0A", &["command"]),
        ("?command=%zz", &["%"]),
        ("?command=%f", &["%"]),
        ("?command=echo+100%", &["%"]),
        ("?command=echo+%4%31", &["%"]),
        ("?command=a&command=b", &["command"]),
        ("?command='a", &["quote"]),
        ("?command=%22a", &["quote"]),
        ("?command=a%00b", &["NUL"]),
    ];
    for (query, words) in table {
        is_refusal(&server.get(&format!("/run{query}"), ""), 400, words);
    }
    assert_eq!(runs(&server), started);
}

/// Half of what was meant must not run: an `&` that nobody encoded begins another field.
#[test]
fn any_other_field_is_refused_by_its_name() {
    let server = Server::start(&[]);
    for (fields, named) in [
        ("command=echo a&x=1", "x"),
        ("x=1&command=echo a", "x"),
        ("cmd=ls", "cmd"),
        ("commands=ls", "commands"),
        ("Command=ls", "Command"),
        ("command=make && make install", "&"),
        ("command=sh -c 'sleep 9 & echo b'", "echo b"),
        ("command=echo a&flag", "flag"),
        ("command=sleep 9 &", "&"),
        ("command=echo a&x=%zz", ""),
        ("ls -l", "ls -l"),
        ("command=true&%1b%0d%0a\u{1}=x", ""),
    ] {
        let words = [named, "--data-urlencode"];
        // curl sends what stands there as it is, in a form.
        let form = post(&server, "/run", "", fields);
        let query = fields.replace(' ', "+").replace('\u{1}', "%01");
        let query = server.get(&format!("/run?{query}"), "");
        for response in [form, query] {
            if named.is_empty() {
                is_refusal(&response, 400, &[]);
            } else {
                is_refusal(&response, 400, &words);
            }
        }
    }
    // Beside the content of a form, the query is looked at too.
    let both = post(&server, "/run?x=1", "", "command=true");
    is_refusal(&both, 400, &["x", "--data-urlencode"]);
    assert_eq!(runs(&server), 0);
}

#[test]
fn forms() {
    let server = Server::start(&[]);
    let form = |content: &str, fields: &str| post(&server, "/run", fields, content);
    for (content, expected) in [
        ("command=echo+a%26b", "a&b\n"),
        ("command=echo%20'a%20%20b'", "a  b\n"),
        // curl -d leaves all but line ends as it is.
        ("command=echo a b", "a b\n"),
        ("command=echo+x&lastEventId=", "x\n"),
    ] {
        let response = form(content, "");
        assert_eq!(output(&response.events(), "stdout"), expected, "{content}");
    }
    let plain = form("command=echo+x", "Accept: text/plain\r\n");
    assert_eq!(plain.text(), "x\n");
    let polyfill = post(&server, "/run?lastEventId=", "", "command=echo+x");
    assert_eq!(output(&polyfill.events(), "stdout"), "x\n");
    let long = |length: usize| {
        let begin = "command=printf+%25s+";
        format!("{begin}{}", "x".repeat(length - begin.len()))
    };
    let largest = form(&long(64 << 10), "");
    assert_eq!(outcome(&largest.events()), "exited:0");
    is_refusal(&form(&long((64 << 10) + 1), ""), 413, &["64"]);
    is_refusal(&form("", ""), 400, &["command"]);
    is_refusal(&form("command=", ""), 400, &["command"]);
    is_refusal(&form("command=a&command=b", ""), 400, &["command"]);
    is_refusal(&form("command=%zz", ""), 400, &["%"]);
    // Said before any of it has come.
    let announced = "POST /run HTTP/1.1\r\nHost: HOST\r\nContent-Length: 65537\r\n\r\n";
    is_refusal(&ask(&server, announced), 413, &["64"]);
    let largest = announced.replace("65537", "9223372036854775807");
    is_refusal(&ask(&server, &largest), 413, &["64"]);
    // What is in the content is no form where the query has the command, of whatever type it is.
    for fields in ["", "Content-Type: application/json\r\n"] {
        let input = post(&server, "/run?command=cat", fields, "command=echo");
        assert_eq!(output(&input.events(), "stdout"), "command=echo");
    }
}

#[test]
fn content_that_is_no_form_is_told_the_way() {
    let server = Server::start(&[]);
    let post = |fields: &str, content| post(&server, "/run", fields, content);
    for fields in [
        "",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "content-type: Application/X-WWW-Form-urlencoded\r\n",
        "Content-Type: application/x-www-form-urlencoded; charset=UTF-8\r\n",
        "Content-Type: application/x-www-form-urlencoded;charset=utf-8\r\n",
    ] {
        let response = post(fields, "command=true");
        assert_eq!(outcome(&response.events()), "exited:0", "{fields}");
    }
    let started = runs(&server);
    for (fields, content) in [
        ("application/json", "{\"command\": \"ls\"}"),
        ("application/json; charset=utf-8", "command=true"),
        ("text/plain", "command=true"),
        ("text/plain;charset=UTF-8", "command=true"),
        (
            "multipart/form-data; boundary=x",
            "--x\r\nContent-Disposition: form-data; name=\"command\"\r\n\r\nls\r\n--x--\r\n",
        ),
        ("application/octet-stream", "command=true"),
        ("application/x-www-form-urlencodedx", "command=true"),
        ("x/application/x-www-form-urlencoded", "command=true"),
        ("application/x-www-form", "command=true"),
    ] {
        let response = post(&format!("Content-Type: {fields}\r\n"), content);
        is_refusal(&response, 415, &["curl", "--data-urlencode", "command="]);
    }
    assert_eq!(runs(&server), started);
}

/// The page is for those who name its type, as browsers do; all others read what `--help` says.
#[test]
fn the_root_answers_in_the_caller_s_kind() {
    let server = Server::start(&[]);
    let help = binary().arg("--help").output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    for (accept, is_page) in [
        ("Accept: text/html\r\n", true),
        ("Accept: TEXT/html;q=0.1\r\n", true),
        ("Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n", true),
        ("Accept: text/plain, text/html\r\n", true),
        ("Accept: */*\r\nAccept: text/html\r\n", true),
        ("", false),
        ("Accept:\r\n", false),
        ("Accept: */*\r\n", false),
        ("Accept: text/plain\r\n", false),
        ("Accept: text/event-stream\r\n", false),
        ("Accept: text/htmlx, application/xhtml+xml\r\n", false),
        ("Accept: text/html;q=0\r\n", false),
    ] {
        let response = server.get("/", accept);
        assert_eq!(response.status, 200, "{accept}");
        is_dated(&response);
        let media_type = response.field("content-type").unwrap();
        if is_page {
            assert_eq!(media_type, "text/html; charset=utf-8", "{accept}");
            assert!(response.text().starts_with("<!doctype html>"), "{accept}");
            let policy = response.field("content-security-policy").unwrap();
            assert!(policy.starts_with("default-src 'none'"), "{policy}");
            assert!(policy.contains("frame-ancestors 'none'"), "{policy}");
        } else {
            assert!(media_type.starts_with("text/plain"), "{accept}");
            assert_eq!(response.text(), help, "{accept}");
        }
    }
    // It shows how to do what people come for.
    for example in [
        "curl -N",
        "/run?command=",
        "Accept: text/plain",
        "--data-urlencode",
        "--data-binary @-",
        "Authorization: Bearer",
        "--allow '",
        "--token-file",
        "0.0.0.0",
    ] {
        assert!(help.contains(example), "{example}");
    }
    assert!(!help.contains("-d 'command="), "{help}");
    let widest = help.lines().map(|line| line.chars().count()).max();
    assert!(help.lines().count() <= 60 && widest <= Some(80), "{help}");
}

#[test]
fn what_may_run_is_told() {
    let all = Server::start(&[]);
    let allow = ["--allow", "uptime", "--allow", "df *", "--allow=echo 'a  b'"];
    let some = Server::start(&allow);
    for (server, expected) in [(&all, ""), (&some, "uptime\ndf *\necho 'a  b'\n")] {
        let response = server.get("/commands", "");
        is_dated(&response);
        assert_eq!((response.status, response.text()), (200, expected));
        let media_type = response.field("content-type").unwrap();
        assert!(media_type.starts_with("text/plain"), "{media_type}");
        // The checks are those of a run.
        for (fields, status) in [
            ("Host: evil.test\r\n", 421),
            ("Host: HOST\r\nOrigin: null\r\n", 403),
            ("Host: HOST\r\nOrigin: http://evil.test\r\n", 403),
            ("Host: HOST\r\nOrigin: http://HOST\r\n", 200),
            ("Host: HOST\r\nSec-Fetch-Site: cross-site\r\n", 403),
            ("Host: HOST\r\nSec-Fetch-Site: same-origin\r\n", 200),
            ("Host: HOST\r\nUser-Agent: Mozilla/5.0\r\n", 403),
        ] {
            let response = ask(server, &format!("GET /commands HTTP/1.1\r\n{fields}\r\n"));
            assert_eq!(response.status, status, "{fields}");
            assert!(status == 200 || !response.text().contains("uptime"));
        }
    }
}

#[test]
fn head_and_options_run_nothing() {
    let folder = Folder::new();
    let server = Server::start(&["--allow", &format!("touch {}", folder.path("file"))]);
    let target = run_target(&format!("touch {}", folder.path("file")));
    let undated = |response: Response| {
        let mut fields = response.fields;
        fields.retain(|(name, _)| name != "date");
        fields.sort();
        (response.status, fields)
    };
    for (target, fields) in [
        ("/", ""),
        ("/", "Accept: text/html\r\n"),
        ("/commands", ""),
        ("/none", ""),
        ("/run", ""),
        ("/run?command=false", ""),
        (&target, "Origin: null\r\n"),
        (&target, ""),
        (&target, "Accept: text/plain\r\n"),
    ] {
        let mut client = server.connect();
        let host = &server.address;
        let head = format!("HEAD {target} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n");
        // Nothing follows but the next answer.
        client.write(format!("{head}GET /none HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        let head = client.head();
        assert_eq!(client.response().status, 404);
        assert!(!folder.0.join("file").exists(), "{target}");
        // The head that GET gets, which runs the command at last.
        let get = server.get(target, fields);
        assert_eq!(undated(head), undated(get), "{target} {fields}");
        let _ = std::fs::remove_file(folder.path("file"));
    }
    for (target, status, allow) in [
        ("/", 204, Some("GET, HEAD, OPTIONS")),
        ("/commands", 204, Some("GET, HEAD, OPTIONS")),
        (&target, 204, Some("GET, HEAD, POST, OPTIONS")),
        ("/run", 204, Some("GET, HEAD, POST, OPTIONS")),
        ("/none", 404, None),
    ] {
        let request = format!("OPTIONS {target} HTTP/1.1\r\nHost: HOST\r\n\r\n");
        let response = ask(&server, &request);
        is_dated(&response);
        assert_eq!((response.status, response.field("allow")), (status, allow), "{target}");
        // RFC 9110, 8.6: no length where there can be no content.
        assert!(status != 204 || response.field("content-length").is_none());
        let is_grant = |(name, _): &(String, String)| name.starts_with("access-control-");
        assert!(!response.fields.iter().any(is_grant));
    }
    for target in ["/", "/commands"] {
        let response = post(&server, target, "", "");
        assert_eq!(response.status, 405);
        assert_eq!(response.field("allow"), Some("GET, HEAD, OPTIONS"));
    }
    assert!(!folder.0.join("file").exists());
}

/// Who is refused reads what was expected and how to get there, in words that a caller knows.
#[test]
fn refusals_say_how_it_goes() {
    let server = Server::start(&["--allow", "true", "--allow", "cat *"]);
    let any = Server::start(&[]);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(9000));
    let large = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(17_000));
    let table: &[(&str, u16, &[&str])] = &[
        ("GET /\r\n\r\n", 400, &["HTTP/1.1"]),
        ("GET http://HOST/run?command=true HTTP/1.1\r\nHost: HOST\r\n\r\n", 400, &["/"]),
        ("OPTIONS * HTTP/1.1\r\nHost: HOST\r\n\r\n", 400, &["/"]),
        ("GET / HTTP/1.1\r\n\r\n", 400, &["Host"]),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\n\r\n", 400, &["Host"]),
        ("GET /none HTTP/1.1\r\nHost: HOST\r\n\r\n", 404, &["/run"]),
        ("POST / HTTP/1.1\r\nHost: HOST\r\n\r\n", 405, &["GET"]),
        ("PUT /run?command=cat HTTP/1.1\r\nHost: HOST\r\n\r\n", 501, &["POST"]),
        (&long, 414, &["8"]),
        (&large, 431, &["16"]),
        ("GET / HTTP/1.1\r\nHost: HOST\r\nExpect: a\r\n\r\n", 417, &["100-continue"]),
        ("GET / HTTP/2.0\r\n\r\n", 505, &["HTTP/1.1"]),
        ("GET /run?command=false HTTP/1.1\r\nHost: HOST\r\n\r\n", 403, &["/commands"]),
        ("GET /run?cmd=true HTTP/1.1\r\nHost: HOST\r\n\r\n", 400, &["cmd", "command="]),
    ];
    for (request, status, words) in table {
        is_refusal(&ask(&server, request), *status, words);
    }
    // As plain text, a program that is not there, by its name; the shell's own words are known.
    let table: &[(&str, u16, &[&str])] = &[
        ("nonesuch", 404, &["nonesuch"]),
        ("/no/such -x", 404, &["/no/such"]),
        ("cd /tmp", 404, &["cd", "shell", "sh -c"]),
        ("export A=b", 404, &["export", "sh -c"]),
        ("A=b env", 404, &["A=b", "shell"]),
        ("ls|wc -l", 404, &["ls|wc", "sh -c"]),
        ("~/x", 404, &["~/x", "shell"]),
        ("$HOME/x", 404, &["$HOME/x", "shell"]),
        ("/etc/passwd", 403, &["/etc/passwd"]),
        ("/", 403, &["/"]),
        // One line, and nothing for a terminal, whatever the name holds.
        ("'a\nb\r\x1b[31mc'", 404, &["a", "b"]),
        ("'\u{85}\u{2028}\u{7f}'", 404, &[]),
        ("''", 404, &[]),
    ];
    for (command, status, words) in table {
        let plain = any.get(&run_target(command), "Accept: text/plain\r\n");
        is_refusal(&plain, *status, words);
        // The same words as an event.
        let events = any.get(&run_target(command), "").events();
        let err = events[0].out();
        assert_eq!(events[0].event, "err", "{events:?}");
        assert!(!err.contains("os error"), "{err}");
        for word in *words {
            assert!(err.contains(word), "no {word:?} in {err}");
        }
    }
}

#[test]
fn a_connection_goes_on_after_requests_without_content() {
    let server = Server::start(&["--allow", "echo *", "--allow", "nonesuch"]);
    let mut client = server.connect();
    let host = format!("Host: {}", server.address);
    // What is refused for what it says was understood as a message. All at once; the answers come in order.
    let requests = [
        ("GET /none", "", 404),
        ("GET /run?command=echo+1", "", 200),
        ("GET /run", "", 400),
        ("PUT /", "", 501),
        ("OPTIONS /run", "", 204),
        ("POST /run?command=echo+2", "", 200),
        ("GET /run?command=false", "", 403),
        ("GET /", "Origin: http://evil.test", 200),
        ("GET /run?command=echo", "Origin: http://evil.test", 403),
        ("GET /run?command=echo", "Last-Event-ID: 1", 204),
        ("GET /run?command=nonesuch", "", 200),
        ("GET /run?command=nonesuch", "Accept: text/plain", 404),
        ("GET /run?command=echo+3", "Accept: text/plain", 200),
        ("GET /commands", "Connection: keep-alive", 200),
    ];
    for (line, field, _) in requests {
        let field = if field.is_empty() { "X: y" } else { field };
        client.write(format!("{line} HTTP/1.1\r\n{host}\r\n{field}\r\n\r\n"));
    }
    let answers = requests.map(|(line, field, status)| {
        let response = client.response();
        assert_eq!(response.status, status, "{line} {field} {}", shown(&response));
        assert_ne!(response.field("connection"), Some("close"), "{line}");
        response
    });
    assert_eq!(output(&answers[1].events(), "stdout"), "1\n");
    assert_eq!(output(&answers[5].events(), "stdout"), "2\n");
    assert_eq!(outcome(&answers[10].events()), "failed:127");
    assert_eq!(answers[12].text(), "3\n");
    client
        .write(format!("GET /run?command=echo HTTP/1.1\r\n{host}\r\nConnection: x, Close\r\n\r\n"));
    let last = client.response();
    assert_eq!(outcome(&last.events()), "exited:0");
    assert_eq!(last.field("connection"), Some("close"));
    assert!(client.is_closed());
}

/// Where a message ends is never a matter of opinion: what comes after content, after what was not
/// understood, or after HTTP/1.0, is no request.
#[test]
fn a_connection_ends_after_all_others() {
    let server = Server::start(&[]);
    let host = format!("Host: {}\r\n", server.address);
    let one = "Content-Length: 1\r\n\r\n1";
    let form = "Content-Length: 12\r\n\r\ncommand=true";
    let table = [
        format!("POST /run?command=cat HTTP/1.1\r\n{host}{one}"),
        format!("POST /run?command=true HTTP/1.1\r\n{host}{one}"),
        format!("POST /run?command=nonesuch HTTP/1.1\r\n{host}{one}"),
        format!("POST /run?command=cat HTTP/1.1\r\n{host}Accept: text/plain\r\n{one}"),
        format!("POST /run?command=cat HTTP/1.1\r\n{host}Connection: keep-alive\r\n{one}"),
        format!("POST /run HTTP/1.1\r\n{host}{form}"),
        format!("POST /none HTTP/1.1\r\n{host}{one}"),
        format!("POST / HTTP/1.1\r\n{host}{one}"),
        format!("PUT /run HTTP/1.1\r\n{host}{one}"),
        format!("GET /run?command=true HTTP/1.1\r\n{host}{one}"),
        format!("GET /run?command=true HTTP/1.1\r\n{host}Last-Event-ID: 1\r\n{one}"),
        format!("GET / HTTP/1.1\r\n{host}{one}"),
        format!("GET /commands HTTP/1.1\r\n{host}{one}"),
        format!("HEAD /none HTTP/1.1\r\n{host}{one}"),
        format!("HEAD /run?command=true HTTP/1.1\r\n{host}{one}"),
        format!("OPTIONS / HTTP/1.1\r\n{host}{one}"),
        "GET /\r\n\r\n".to_string(),
        "GET / HTTP/3.0\r\n\r\n".to_string(),
        "GET / HTTP/1.1\r\nA b\r\n\r\n".to_string(),
        "GET / HTTP/1.1\r\n\r\n".to_string(),
        format!("GET / HTTP/1.1\r\n{host}Content-Length: x\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{host}Connection: close\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{host}Connection: a\r\nConnection: CLOSE , b\r\n\r\n"),
        "GET / HTTP/1.0\r\n\r\n".to_string(),
        "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".to_string(),
        "GET /run?command=true HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".to_string(),
    ];
    for request in table {
        let mut client = server.connect();
        client.write(format!("{request}GET /run?command=echo+smuggled HTTP/1.1\r\n{host}\r\n"));
        let response = if request.starts_with("HEAD") { client.head() } else { client.response() };
        assert_eq!(response.field("connection"), Some("close"), "{request:?}");
        assert!(client.is_closed(), "{request:?}");
    }
    runs(&server);
    assert!(!server.log().contains("smuggled"), "{}", server.log());
}

/// The answer to a client that sends a byte every now and then until it has it.
fn response_while_sending(client: &mut Client) -> Response {
    let mut writer = client.stream.get_ref().try_clone().unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Faster than the program looks up, so that each of its reads gets something.
            while !is_over.load(Ordering::SeqCst) && writer.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(30));
            }
        });
        let response = client.response();
        is_over.store(true, Ordering::SeqCst);
        response
    })
}

/// The waits are the program's own and add up, so all of them are waited for at once.
#[test]
fn a_request_has_five_seconds() {
    let server = Server::start(&[]);
    let host = &server.address;
    let took = |start: Instant| {
        let took = start.elapsed().as_secs_f64();
        assert!((4.5..9.5).contains(&took), "{took} s");
    };
    let waiting = |begin: &str| {
        let mut client = server.connect();
        client.write(begin.replace("HOST", host));
        client
    };
    let trickles = |begin: &str| {
        let start = Instant::now();
        let response = response_while_sending(&mut waiting(begin));
        is_refusal(&response, 408, &["5"]);
        assert_eq!(response.field("connection"), Some("close"));
        took(start);
    };
    let form = "POST /run HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1000\r\n\r\ncommand=";
    let stalls = |begin: &str| {
        let start = Instant::now();
        is_refusal(&waiting(begin).response(), 408, &["5"]);
        took(start);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| trickles("GET / HTTP/1.1\r\nX: "));
        scope.spawn(|| trickles("GET /"));
        scope.spawn(|| trickles(form));
        scope.spawn(|| stalls("GET / HTTP/1.1\r\nHost: HOST\r\n"));
        scope.spawn(|| stalls(form));
        // Who has said nothing is told nothing, be it at first or later.
        scope.spawn(|| {
            let start = Instant::now();
            assert!(server.connect().is_closed());
            took(start);
        });
        scope.spawn(|| {
            let mut client = waiting("GET /none HTTP/1.1\r\nHost: HOST\r\n\r\n");
            assert_eq!(client.response().status, 404);
            let start = Instant::now();
            assert!(client.is_closed());
            took(start);
        });
        scope.spawn(|| {
            let mut client = waiting("GET /none HTTP/1.1\r\nHost: HOST\r\n\r\nGET /none");
            assert_eq!(client.response().status, 404);
            assert_eq!(client.response().status, 408);
        });
        // The head and the form have five seconds each.
        scope.spawn(|| {
            let mut client = waiting("POST /run HTTP/1.1\r\n");
            std::thread::sleep(Duration::from_secs(3));
            client.write(format!("Host: {host}\r\nContent-Length: 14\r\n\r\ncomm"));
            std::thread::sleep(Duration::from_secs(3));
            client.write("and=echo+f");
            assert_eq!(output(&client.response().events(), "stdout"), "f\n");
        });
        // What a command is fed has all the time in the world.
        scope.spawn(|| {
            let (mut client, _) = server.begin_post("cat", "Content-Length: 6\r\n\r\none");
            client.read_until("one");
            std::thread::sleep(Duration::from_millis(6500));
            client.write("two");
            let events = client.rest();
            assert_eq!(output(&events, "stdout"), "two");
            assert_eq!(outcome(&events), "exited:0");
        });
    });
}

/// No reset cuts a refusal off, whether the rest comes before it or after.
#[test]
fn a_refusal_arrives_whole_whatever_is_still_sent() {
    let folder = Folder::new();
    let file = folder.write("token", "secret\n");
    let (open, locked) = (Server::start(&[]), Server::start(&["--token-file", &file]));
    let flood = vec![b'x'; 3 << 20];
    for (server, head, status) in [
        (&open, "GET / HTTP/9.9\r\n", 505),
        (&open, "GET /", 414),
        (&open, "GET / HTTP/1.1\r\nA: ", 431),
        (&open, "POST /none HTTP/1.1\r\nHost: HOST\r\nContent-Length: 3145728\r\n\r\n", 404),
        (&open, "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 3145728\r\n\r\n", 405),
        (&open, "PUT /run HTTP/1.1\r\nHost: HOST\r\nContent-Length: 3145728\r\n\r\n", 501),
        (&open, "POST /run HTTP/1.1\r\nHost: HOST\r\nContent-Length: 3145728\r\n\r\n", 413),
        (&open, "POST /run HTTP/1.1\r\nHost: evil.test\r\nContent-Length: 3145728\r\n\r\n", 421),
        (
            &open,
            "POST /run HTTP/1.1\r\nHost: HOST\r\nContent-Type: a/b\r\nContent-Length: 60000\r\n\r\n",
            415,
        ),
        (
            &open,
            "POST /run?command=nonesuch HTTP/1.1\r\nHost: HOST\r\nAccept: text/plain\r\nContent-Length: 3145728\r\n\r\n",
            404,
        ),
        (
            &open,
            "POST /run?command=a HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n300000\r\n",
            411,
        ),
        (
            &locked,
            "POST /run?command=a HTTP/1.1\r\nHost: a\r\nContent-Length: 3145728\r\n\r\n",
            401,
        ),
    ] {
        let mut client = server.connect();
        client.write(head.replace("HOST", &server.address));
        client.write(&flood);
        let response = client.response();
        is_refusal(&response, status, &[]);
        // Still sending, now that it has been said.
        client.write(&flood[..100_000]);
        client.half_close();
        assert!(client.is_closed(), "{head:?}");
    }
}

/// Who has been refused and neither goes nor stops sending is read on for a moment, and no longer.
#[test]
fn who_is_refused_holds_no_thread() {
    let server = Server::start(&[]);
    let rest = server.at_rest();
    let mut clients: Vec<_> = (0..3).map(|_| server.connect()).collect();
    for client in &mut clients {
        let line = "POST /none HTTP/1.1\r\nContent-Length: 1000000";
        client.write(format!("{line}\r\nHost: {}\r\n\r\n", server.address));
        is_refusal(&client.response(), 404, &[]);
    }
    wait_for("the connections to be given up", || {
        clients.iter_mut().for_each(|client| client.write("x"));
        server.threads() <= rest.0
    });
    server.comes_to_rest(rest);
}

#[test]
fn expect_is_answered_once_the_request_is_accepted() {
    let folder = Folder::new();
    let file = folder.write("token", "secret\n");
    let (server, locked) =
        (Server::start(&["--max-commands", "2"]), Server::start(&["--token-file", &file]));
    let head = |server: &Server, target: &str, version, fields: &str| {
        let host = &server.address;
        format!(
            "POST {target} HTTP/{version}\r\nHost: {host}\r\nExpect: 100-Continue\r\n{fields}\r\n"
        )
    };
    let three = "Content-Length: 3\r\n";
    let mut client = server.connect();
    client.write(head(&server, "/run?command=cat", "1.1", three));
    assert_eq!(client.head().status, 100);
    client.started();
    client.write("abc");
    assert_eq!(output(&client.rest(), "stdout"), "abc");
    // A form is asked for before its command is known.
    let form = "Content-Length: 14\r\n";
    let mut client = server.connect();
    client.write(head(&server, "/run", "1.1", form));
    assert_eq!(client.head().status, 100);
    client.write("command=echo+f");
    assert_eq!(output(&client.response().events(), "stdout"), "f\n");
    // HTTP/1.0 knows no such answer, and sends its content without.
    for (target, content, expected) in
        [("/run?command=cat", "abc", "abc"), ("/run", "command=echo+f", "f\n")]
    {
        let fields = format!("Content-Length: {}\r\n", content.len());
        let mut client = server.connect();
        client.write(head(&server, target, "1.0", &fields) + content);
        assert_eq!(output(&client.response().events(), "stdout"), expected);
    }
    // Who is refused is not asked. What he sends in place of the content is no request.
    let _held = [(); 2].map(|()| server.begin("sleep 1000"));
    let json = "Content-Type: application/json\r\nContent-Length: 3\r\n";
    for (server, target, fields, status) in [
        (&server, "/none", three, 404),
        (&server, "/", three, 405),
        (&server, "/run?command=", three, 400),
        (&server, "/run?command=cat", "Content-Length: x\r\n", 400),
        (&server, "/run?command=cat", "Transfer-Encoding: chunked\r\n", 411),
        (&server, "/run?command=cat", "Origin: null\r\nContent-Length: 3\r\n", 403),
        (&server, "/run?command=cat", three, 503),
        (&server, "/run", "Content-Length: 65537\r\n", 413),
        (&server, "/run", json, 415),
        (&server, "/run?x=1", three, 400),
        (&server, "/run", "Origin: null\r\nContent-Length: 3\r\n", 403),
        (&locked, "/run", three, 401),
        (&locked, "/run?command=cat", three, 401),
    ] {
        let mut client = server.connect();
        client.write(head(server, target, "1.1", fields));
        let response = client.response();
        is_refusal(&response, status, &[]);
        assert_eq!(response.field("connection"), Some("close"), "{target}");
        client.write(format!("GET /none HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
        client.half_close();
        assert!(client.is_closed(), "{target}");
    }
}

/// The client of a command that was never started keeps its content, and what it asks next is not taken
/// for it.
#[test]
fn a_failed_start_does_not_swallow_the_next_request() {
    let server = Server::start(&[]);
    for (accept, status) in [("text/event-stream", 200), ("text/plain", 404)] {
        let mut client = server.connect();
        let host = &server.address;
        client.write(format!(
            "POST /run?command=nonesuch HTTP/1.1\r\nHost: {host}\r\nAccept: {accept}\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
        ));
        let response = client.response();
        assert_eq!(response.status, status);
        assert_eq!(response.field("connection"), Some("close"));
        client.write(format!("GET /none HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert!(client.is_closed(), "{accept}");
    }
}

#[test]
fn content_is_streamed_to_the_command_as_it_comes() {
    let server = Server::start(&[]);
    let (mut client, _) = server.begin_post("cat", "Content-Length: 9\r\n\r\n");
    for word in ["one", "two"] {
        client.write(word);
        client.read_until(word);
    }
    // Its end comes with the last of it, perhaps in the same chunk.
    client.write("six");
    let events = client.rest();
    assert_eq!((output(&events, "stdout"), outcome(&events)), ("six".into(), "exited:0".into()));
    // All of it, and nothing more, whatever it is.
    let content: Vec<u8> = (0..700_000_u32).map(|number| (number * 7) as u8).collect();
    let mut client = server.connect();
    client.write(format!(
        "POST /run?command=cat HTTP/1.1\r\nHost: {}\r\nAccept: text/plain\r\nContent-Length: 700000\r\n\r\n",
        server.address
    ));
    let mut writer = client.stream.get_ref().try_clone().unwrap();
    let response = std::thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&[&content[..], b"surplus"].concat()));
        client.response()
    });
    assert!(response.content == content);
    assert_eq!(response.trailers, [("exit-code".into(), "0".into())]);
}

#[test]
fn a_command_that_reads_slowly_slows_its_client() {
    let server = Server::start(&["--heartbeat", "1"]);
    let (mut client, pid) = server.begin_post("sleep 1000", "Content-Length: 100000000\r\n\r\n");
    let stream = client.stream.get_ref();
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let piece = vec![b'x'; 1 << 20];
    let mut sent = 0;
    while client.stream.get_mut().write_all(&piece).is_ok() {
        sent += 1;
        assert!(sent < 90, "the server takes it all");
    }
    drop(client);
    is_gone(pid);
}

/// What the command did not read is nobody's: the answer is whole, and the connection ends.
#[test]
fn content_that_the_command_does_not_want() {
    let server = Server::start(&[]);
    for (command, sent) in [
        ("true", 0),
        ("true", 300_000),
        ("head -c 1", 3),
        ("head -c 1", 300_000),
        ("sh -c 'exec <&-; sleep 0.1; echo done'", 300_000),
    ] {
        let mut client = server.connect();
        client.write(format!(
            "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Length: 300000\r\n\r\n",
            run_target(command),
            server.address
        ));
        client.write("x".repeat(sent));
        let response = client.response();
        assert_eq!(outcome(&response.events()), "exited:0", "{command}");
        assert_eq!(response.field("connection"), Some("close"));
        client.half_close();
        assert!(client.is_closed(), "{command}");
    }
}

/// Half of an input must not look like all of it.
#[test]
fn content_that_breaks_off_ends_the_command() {
    let server = Server::start(&["--grace", "0.5"]);
    let rest = server.at_rest();
    for command in ["cat", "sh -c 'trap \"\" TERM; cat; echo came to its end'"] {
        let (mut client, pid) = server.begin_post(command, "Content-Length: 10\r\n\r\n");
        client.write("abc");
        client.read_until("abc");
        client.half_close();
        let events = client.rest();
        assert!(events.iter().any(|event| event.event == "err"), "{events:?}");
        assert_eq!(output(&events, "stdout"), "", "{events:?}");
        assert_ne!(outcome(&events), "exited:0", "{events:?}");
        assert!(client.is_closed());
        is_gone(pid);
    }
    server.comes_to_rest(rest);
}

/// A place is taken when a command starts, after every check: until then nobody needs one.
#[test]
fn a_place_is_taken_when_a_command_starts() {
    let server = Server::start(&["--max-commands", "1"]);
    let idle: Vec<_> = (0..20).map(|_| server.connect()).collect();
    assert_eq!(outcome(&server.run("true")), "exited:0");
    // The place is free again when the stream has ended.
    let mut held = None;
    wait_for("a place", || {
        let mut client = server.connect();
        client.write(format!(
            "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\n\r\n",
            server.address
        ));
        let head = client.head();
        held = (head.status == 200).then_some(client);
        held.is_some()
    });
    let get = |target: &str, fields: &str| server.get(target, fields);
    for (target, fields, status) in [
        ("/", "", 200),
        ("/", "Accept: text/html\r\n", 200),
        ("/commands", "", 200),
        ("/none", "", 404),
        ("/run", "", 400),
        ("/run?command=true", "Origin: null\r\n", 403),
        ("/run?command=true", "Last-Event-ID: 1\r\n", 204),
    ] {
        assert_eq!(get(target, fields).status, status, "{target} {fields}");
    }
    let request = format!("GET /run?command=true HTTP/1.1\r\nHost: {}\r\n\r\n", server.address);
    let mut client = server.connect();
    client.write(&request);
    let refused = client.response();
    is_refusal(&refused, 503, &["command", "again"]);
    assert_eq!(refused.field("retry-after"), Some("1"));
    let plain = get("/run?command=true", "Accept: text/plain\r\n");
    is_refusal(&plain, 503, &["again"]);
    let form = post(&server, "/run", "", "command=true");
    is_refusal(&form, 503, &["again"]);
    // The same connection asks again, as often as it likes.
    drop(held);
    wait_for("the place", || {
        client.write(&request);
        client.response().status == 200
    });
    drop(idle);
}

/// Lets this process hold that many connections, where the host would let it.
fn may_hold(count: usize) {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().nth(3));
    if soft.and_then(|soft| soft.parse().ok()).unwrap_or(count) < count {
        let process = std::process::id().to_string();
        let mut command = Command::new("prlimit");
        command.args(["--pid", &process, &format!("--nofile={count}:")]);
        assert!(command.status().unwrap().success());
    }
}

#[test]
fn five_hundred_silent_connections_keep_nobody_out() {
    may_hold(3000);
    let folder = Folder::new();
    let file = folder.write("token", "secret\n");
    let server = Server::start(&["--token-file", &file]);
    let serve = || {
        let response = server.get("/run?command=true", "Authorization: Bearer secret\r\n");
        assert_eq!(outcome(&response.events()), "exited:0");
    };
    let mut silent: Vec<_> = (0..500).map(|_| server.connect()).collect();
    (0..5).for_each(|_| serve());
    // They had not gone by then: the last of them still waits to be closed.
    let mut last = silent.pop().unwrap();
    let stream = last.stream.get_mut();
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let read = stream.read(&mut [0]).map_err(|why| why.kind());
    assert_eq!(read, Err(ErrorKind::WouldBlock));
    // Now there are too many; whoever comes waits until the first ones have gone.
    silent.extend((0..100).map(|_| server.connect()));
    serve();
    assert!(silent.iter_mut().take(400).all(Client::is_closed));
}

/// At the server's end nobody is told off for a request that he was still writing.
#[test]
fn a_shutdown_ends_what_has_not_been_asked_without_a_word() {
    let mut server = Server::start(&[]);
    let mut idle = server.connect();
    idle.write(format!("GET /none HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
    assert_eq!(idle.response().status, 404);
    let mut clients = vec![idle, server.connect()];
    for begin in [
        "GET / HTTP/1.1\r\nHo",
        "POST /run HTTP/1.1\r\nHost: HOST\r\nContent-Length: 100\r\n\r\ncommand=true",
    ] {
        let mut client = server.connect();
        client.write(begin.replace("HOST", &server.address));
        clients.push(client);
    }
    // They have been accepted once there is a thread for each, beside the two that are always there.
    wait_for("the connections", || server.threads() >= 2 + clients.len());
    server.signal("TERM");
    for client in &mut clients {
        let mut said = Vec::new();
        // The end may be a reset, for those whose request was not read.
        let _ = client.stream.read_to_end(&mut said);
        assert_eq!(String::from_utf8_lossy(&said), "");
    }
    assert!(server.exit_status().success());
    assert!(!server.log().contains("status=408"), "{}", server.log());
}

/// Bytes flipped and requests cut, by a fixed seed: each is answered or closed, and leaves nothing behind.
#[test]
fn mutilated_requests_do_no_harm() {
    let server = Server::start(&[]);
    server.run("true");
    let rest = server.at_rest();
    let whole = format!(
        "GET /none HTTP/1.1\r\nHost: {}\r\n\r\nPOST /run?command=true HTTP/1.1\r\nHost: {0}\r\n\
        Content-Length: 5\r\nAccept: text/plain;q=0.5, */*;q=0\r\n\r\nhello",
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
        let is_cut = round % 4 == 0;
        if is_cut {
            bytes.truncate(random(bytes.len()));
        }
        let mut client = server.connect();
        client.write(&bytes);
        client.half_close();
        let mut answer = Vec::new();
        let read = client.stream.read_to_end(&mut answer);
        let shown = String::from_utf8_lossy(&bytes);
        read.unwrap_or_else(|why| panic!("{why}: {shown:?}"));
        let is_answered = answer.starts_with(b"HTTP/1.1 ");
        assert!(is_answered || answer.is_empty() && is_cut, "{shown:?}: {answer:?}");
    }
    assert_eq!(outcome(&server.run("true")), "exited:0");
    server.comes_to_rest(rest);
    let log = server.log();
    let is_line = |line: &str| line.starts_with("20") && line.contains("Z ");
    assert!(log.lines().all(is_line), "{log}");
}
