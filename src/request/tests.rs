use super::*;

const WHOLE: &[u8] = b"POST /run?command=x%20y HTTP/1.1\r\nHost: a.b:1\r\nExpect: 100-continue\r\n\
    Content-Length: 11\r\nAccept: text/html;q=1, Text/Plain ; q=0.5\r\n\r\n\
    hello worldGET / HTTP/1.1\r\n";
const CONTENT: &[u8] = b"hello worldGET / HTTP/1.1\r\n";

/// A head, and what is left of the input.
fn parse(bytes: &[u8]) -> Result<(Request, Vec<u8>), Refusal> {
    let (mut request, mut input) = (Request::default(), bytes);
    request.read(&mut input)?;
    Ok((request, input.to_vec()))
}

fn fields(fields: &str) -> Result<Request, Refusal> {
    let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    parse(head.as_bytes()).map(|parsed| parsed.0)
}

/// Gives one byte at a time, and is interrupted before each.
struct Trickle<'a>(&'a [u8], bool);

impl std::io::Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let length = self.0.len().min(buffer.len()).min(1);
        buffer[..length].copy_from_slice(&self.0[..length]);
        self.0 = &self.0[length..];
        Ok(length)
    }
}

#[test]
fn a_request_is_taken_apart() {
    let (request, rest) = parse(WHOLE).unwrap();
    assert_eq!((request.method.as_str(), request.minor_version), ("POST", 1));
    assert_eq!(request.path_and_query(), ("/run", "command=x%20y"));
    assert_eq!((request.content_length, rest), (11, CONTENT.to_vec()));
    assert_eq!(request.field("host"), Some("a.b:1"));
    assert!(request.expects_continue() && request.ends_connection());
    assert!(request.accepts("text/plain") && !request.accepts("text"));
}

#[test]
fn pieces_make_no_difference() {
    let mut input = std::io::BufReader::new(Trickle(WHOLE, false));
    // The first look at the input is the caller's, which retries.
    let _ = input.fill_buf();
    let mut request = Request::default();
    assert_eq!(request.read(&mut input), Ok(()));
    assert_eq!(request.content_length, 11);
}

#[test]
fn every_prefix_breaks_off() {
    for length in 0..WHOLE.len() - CONTENT.len() {
        let cut = parse(&WHOLE[..length]);
        assert!(cut.err() == Some(refusal::CUT), "{length}");
    }
}

#[test]
fn every_byte_changed_is_taken_or_refused() {
    let mut refused = 0;
    for place in 0..WHOLE.len() {
        for byte in 0..=255 {
            let mut bytes = WHOLE.to_vec();
            bytes[place] = byte;
            refused += usize::from(parse(&bytes).is_err());
        }
    }
    assert!(refused > WHOLE.len() * 60, "{refused}");
}

#[test]
fn request_lines() {
    let table = [
        ("GET / HTTP/1.1", Ok(("/", ""))),
        ("GET /? HTTP/1.1", Ok(("/", ""))),
        ("GET /run?a=b?c HTTP/1.0", Ok(("/run", "a=b?c"))),
        ("GET //run HTTP/1.1", Ok(("//run", ""))),
        ("GET /a://b HTTP/1.9", Ok(("/a://b", ""))),
        ("!#$%&'*+-.^_`|~ / HTTP/1.1", Ok(("/", ""))),
        ("GET /run?a=\"{|}\" HTTP/1.1", Ok(("/run", "a=\"{|}\""))),
        ("GET /run?a#b HTTP/1.1", Err(refusal::LINE)),
        ("GET http://h/ HTTP/1.1", Err(refusal::LINE)),
        ("OPTIONS * HTTP/1.1", Err(refusal::LINE)),
        ("CONNECT h:1 HTTP/1.1", Err(refusal::LINE)),
        ("GET run HTTP/1.1", Err(refusal::LINE)),
        ("GET ?a HTTP/1.1", Err(refusal::LINE)),
        ("GET  HTTP/1.1", Err(refusal::LINE)),
        ("GET /\u{e9} HTTP/1.1", Err(refusal::LINE)),
        ("GET /\t HTTP/1.1", Err(refusal::LINE)),
        ("GET / HTTP/1.1 ", Err(refusal::LINE)),
        ("GET  / HTTP/1.1", Err(refusal::LINE)),
        (" GET / HTTP/1.1", Err(refusal::LINE)),
        ("G(T / HTTP/1.1", Err(refusal::LINE)),
        ("GET /", Err(refusal::LINE)),
        ("GET / http/1.1", Err(refusal::LINE)),
        ("GET / HTTP/1.10", Err(refusal::LINE)),
        ("GET / HTTP/1", Err(refusal::LINE)),
        ("GET / HTTP/2.0", Err(refusal::VERSION)),
        ("GET / HTTP/0.9", Err(refusal::VERSION)),
    ];
    for (line, expected) in table {
        let mut request = Request::default();
        let parsed = request.parse_line(line.as_bytes());
        assert_eq!(parsed.map(|()| request.path_and_query()), expected, "{line}");
    }
    assert!(parse(b"\r\nGET / HTTP/1.0\r\n\r\n").is_ok());
    assert!(parse(b"\r\n\r\nGET / HTTP/1.0\r\n\r\n").is_err());
}

#[test]
fn field_lines() {
    for good in ["A:", "A: b", "A:\tb \t", "a-B_1: \u{e9}"] {
        assert!(fields(&format!("{good}\r\n")).is_ok(), "{good:?}");
    }
    for bad in
        ["A", ": b", "A : b", " A: b", "A b: c", "A: b\0", "A: b\x7f", "A: b\x1b", "\u{e9}: b"]
    {
        assert_eq!(fields(&format!("{bad}\r\n")).err(), Some(refusal::FIELD), "{bad:?}");
    }
    for bare in ["A: b\nC: d\r\n", "A: b\rC: d\r\n", "A: b\r\r\n", "A: b\n"] {
        assert_eq!(fields(bare).err(), Some(refusal::LINE_END), "{bare:?}");
    }
    // A folded line is a field without a name.
    assert_eq!(fields("A: b\r\n c\r\n").err(), Some(refusal::FIELD));
    assert_eq!(fields("A: \t b c\t\r\na: d\r\n").unwrap().field("a"), Some("b c, d"));
}

#[test]
fn limits_are_exact() {
    let (longest_line, longest_head) = (LONGEST_LINE as usize, LONGEST_HEAD as usize);
    let line = |length: usize| format!("GET /{} HTTP/1.0\r\n", "x".repeat(length - 14));
    let request = |line: &str, rest: &str| parse(format!("{line}{rest}\r\n").as_bytes()).map(drop);
    assert_eq!(request(&line(longest_line), ""), Ok(()));
    assert_eq!(request(&line(longest_line + 1), ""), Err(refusal::LONG_LINE));
    let start = "GET / HTTP/1.0\r\n";
    let filler = |length: usize| {
        let others = start.len() + "A: \r\n\r\n".len();
        format!("A: {}\r\n", "x".repeat(length - others))
    };
    assert_eq!(request(start, &filler(longest_head)), Ok(()));
    assert_eq!(request(start, &filler(longest_head + 1)), Err(refusal::LONG_HEAD));
    assert_eq!(request(start, &"A:\r\n".repeat(MOST_FIELDS)), Ok(()));
    assert_eq!(request(start, &"A:\r\n".repeat(MOST_FIELDS + 1)), Err(refusal::LONG_HEAD));
    // Without an end they are refused as soon as they are too long.
    assert_eq!(parse(&vec![b'x'; longest_line + 2]).err(), Some(refusal::LONG_LINE));
}

#[test]
fn framing() {
    let table = [
        ("", Ok(0)),
        ("Content-Length: 0\r\n", Ok(0)),
        ("content-length:\t0012 \r\n", Ok(12)),
        ("Content-Length: 9223372036854775807\r\n", Ok(i64::MAX as u64)),
        ("Content-Length: 9223372036854775808\r\n", Err(refusal::LENGTH)),
        ("Content-Length: 18446744073709551615\r\n", Err(refusal::LENGTH)),
        ("Content-Length: 99999999999999999999\r\n", Err(refusal::LENGTH)),
        ("Content-Length: +5\r\n", Err(refusal::LENGTH)),
        ("Content-Length: -5\r\n", Err(refusal::LENGTH)),
        ("Content-Length: 0x5\r\n", Err(refusal::LENGTH)),
        ("Content-Length: 5 5\r\n", Err(refusal::LENGTH)),
        ("Content-Length: 5, 5\r\n", Err(refusal::LENGTH)),
        ("Content-Length:\r\n", Err(refusal::LENGTH)),
        ("Content-Length: 5\r\nContent-Length: 5\r\n", Err(refusal::LENGTH)),
        ("Transfer-Encoding: chunked\r\n", Err(refusal::NO_LENGTH)),
        ("Transfer-Encoding:\r\n", Err(refusal::NO_LENGTH)),
        ("Transfer-Encoding: gzip\r\nContent-Length: 5\r\n", Err(refusal::NO_LENGTH)),
        ("Expect: 100-Continue\r\n", Ok(0)),
        ("Expect: 100-continue, x\r\n", Err(refusal::EXPECT)),
        ("Expect: x\r\n", Err(refusal::EXPECT)),
        ("Expect:\r\n", Err(refusal::EXPECT)),
        ("Host: b\r\n", Err(refusal::HOST)),
    ];
    for (text, expected) in table {
        let length = fields(text).map(|request| request.content_length);
        assert_eq!(length, expected, "{text:?}");
    }
    assert_eq!(parse(b"GET / HTTP/1.1\r\n\r\n").err(), Some(refusal::HOST));
    let old = parse(b"POST / HTTP/1.0\r\nContent-Length: 1\r\nExpect: x\r\n\r\n").unwrap().0;
    assert!(!old.expects_continue() && old.ends_connection());
}

#[test]
fn what_accept_names() {
    // The media types: events, and HTML.
    let table = [
        ("", true, false),
        ("Accept: */*\r\n", true, false),
        ("Accept: text/plain\r\n", false, false),
        ("Accept: TEXT/plain; charset=utf-8\r\n", false, false),
        ("Accept: text/plain;q=0\r\n", true, false),
        ("Accept: text/plain; q=0.000\r\n", true, false),
        ("Accept: text/plain;q=0.1\r\n", false, false),
        ("Accept: text/plain, text/event-stream\r\n", true, false),
        ("Accept: text/plain\r\nAccept: text/event-stream\r\n", true, false),
        ("Accept: text/plain, text/event-stream;q=0\r\n", false, false),
        ("Accept: application/json, text/plain, */*\r\n", true, false),
        ("Accept: text/plainer\r\n", true, false),
        ("Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8\r\n", true, true),
        ("Accept: text/html;q=0\r\n", true, false),
    ];
    for (text, events, html) in table {
        let request = fields(text).unwrap();
        assert_eq!(
            (request.wants_events(), request.accepts("text/html")),
            (events, html),
            "{text}"
        );
    }
}

#[test]
fn who_ends_the_connection() {
    for (text, ends) in [
        ("", false),
        ("Connection: keep-alive\r\n", false),
        ("Connection: x, Close\r\n", true),
        ("Connection: x\r\nConnection: close\r\n", true),
        ("Connection: closed\r\n", false),
        ("Content-Length: 1\r\n", true),
    ] {
        assert_eq!(fields(text).unwrap().ends_connection(), ends, "{text}");
    }
}

#[test]
fn forms() {
    let unknown = |name: &str| refusal::OTHER_FIELD.about(name);
    let table = [
        ("", Ok((None, false))),
        ("command=x+%2By%25", Ok((Some("x +y%"), false))),
        ("%63ommand=x", Ok((Some("x"), false))),
        ("command=a=b", Ok((Some("a=b"), false))),
        ("command", Ok((Some(""), false))),
        ("command=&lastEventId=", Ok((Some(""), false))),
        ("lastEventId=1&command=x", Ok((Some("x"), true))),
        ("evs_last_event_id=1&lastEventId=", Ok((None, true))),
        ("command=x&command=x", Err(refusal::COMMAND)),
        ("command=make+&&+make+install", Err(unknown(""))),
        ("command=x&", Err(unknown(""))),
        ("&command=x", Err(unknown(""))),
        ("Command=x", Err(unknown("Command"))),
        ("command=x&a%00b=1", Err(unknown("a\u{fffd}b"))),
        ("command=%", Err(refusal::ESCAPE)),
        ("command=%a", Err(refusal::ESCAPE)),
        ("command=%g0", Err(refusal::ESCAPE)),
        ("command=%+1", Err(refusal::ESCAPE)),
        ("%=x", Err(refusal::ESCAPE)),
    ];
    for (form, expected) in table {
        let expected = expected.map(|(command, is_reconnect)| Form {
            command: command.map(|command| command.as_bytes().to_vec()),
            is_reconnect,
        });
        assert_eq!(parse_form(form.as_bytes()), expected, "{form}");
    }
}

#[test]
fn percent_escapes() {
    let every: String = (0..=255).map(|byte| format!("%{byte:02x}")).collect();
    assert_eq!(percent_decode(every.as_bytes()), ((0..=255).collect(), true));
    for (text, expected) in [("%", "%"), ("%4", "%4"), ("%g0%41", "%g0A"), ("%%41+", "%A+")] {
        assert_eq!(percent_decode(text.as_bytes()), (expected.into(), false), "{text}");
    }
}

#[test]
fn hosts() {
    let host = |host: &str| {
        let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
        parse(head.as_bytes()).map(drop)
    };
    for good in ["a.b:1", "A", "a:", "127.0.0.1", "[::1]", "[::1]:80", "a_b~%41"] {
        assert_eq!(host(good), Ok(()), "{good}");
    }
    for bad in ["", "a b", "a/b", "a@b", "a\tb", "a,b", "\u{e9}", "a\r\nHost: a", "a\r\nHost:"] {
        assert_eq!(host(bad), Err(refusal::HOST), "{bad}");
    }
    assert_eq!(parse(b"GET / HTTP/1.0\r\n\r\n").err(), None);
    assert_eq!(parse(b"GET / HTTP/1.0\r\nHost:\r\n\r\n").err(), Some(refusal::HOST));
}
