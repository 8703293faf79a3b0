use super::*;

/// Content that is read here at the most.
const MOST: u64 = 10_000;

const WHOLE: &[u8] =
    b"POST http://a.b:1/run?command=x%20y HTTP/1.1\r\nHost: a.b:1\r\nExpect: 100-continue\r\n\
    Transfer-Encoding: chunked\r\nAccept: text/html;q=1, Text/Plain ; q=0.5\r\n\r\n\
    5;a=\"b\"\r\nhello\r\n00006\r\n world\r\n0\r\nTrailer: x\r\n\r\nGET / HTTP/1.1\r\n";

/// A head, its content, and what is left of the input.
fn parse(bytes: &[u8]) -> Result<(Head, Vec<u8>, Vec<u8>)> {
    let (mut head, mut content) = (Head::default(), Content::new(bytes));
    content.read_head(&mut head)?;
    let mut taken = Vec::new();
    content.read(MOST, |piece| taken.extend_from_slice(piece))?;
    let mut rest = Vec::new();
    content.input.read_to_end(&mut rest).unwrap();
    Ok((head, taken, rest))
}

/// Gives one byte at a time.
struct Trickle<'a>(&'a [u8]);

impl std::io::Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.0.len().min(buffer.len()).min(1);
        buffer[..length].copy_from_slice(&self.0[..length]);
        self.0 = &self.0[length..];
        Ok(length)
    }
}

#[test]
fn a_request_is_taken_apart() {
    let (head, content, rest) = parse(WHOLE).unwrap();
    assert_eq!(
        (head.method.as_str(), head.path.as_str(), head.query.as_str(), head.minor),
        ("POST", "/run", "command=x%20y", 1)
    );
    assert_eq!(head.authority.as_deref(), Some("a.b:1"));
    assert_eq!((content.as_slice(), rest), (&b"hello world"[..], b"GET / HTTP/1.1\r\n".to_vec()));
    assert_eq!(head.all("host"), ["a.b:1"]);
    assert!(head.lists("accept", "text/plain") && !head.lists("accept", "text") && !head.close);
}

#[test]
fn pieces_make_no_difference() {
    let mut request = Content::new(Trickle(WHOLE));
    request.read_head(&mut Head::default()).unwrap();
    assert!(request.awaits_continue && !request.is_at_end());
    let mut content = Vec::new();
    let read = request.read(11, |piece| content.extend_from_slice(piece));
    assert_eq!(read, Ok(()));
    assert!(content == b"hello world" && request.is_at_end());
}

#[test]
fn content_is_read_up_to_its_limit() {
    let most = "x".repeat(MOST as usize);
    let head = "POST / HTTP/1.1\r\n";
    let read = |framing: String| parse(format!("{head}{framing}").as_bytes());
    let by_length = |length| read(format!("Content-Length: {length}\r\n\r\n{most}"));
    assert_eq!(by_length(MOST as usize).unwrap().1, most.as_bytes());
    assert_eq!(by_length(MOST as usize + 1).err(), Some(Answer::ContentTooLarge));
    let size = format!("{MOST:x}");
    let in_chunks =
        |rest| read(format!("Transfer-Encoding: chunked\r\n\r\n{size}\r\n{most}\r\n{rest}"));
    assert_eq!(in_chunks("0\r\n\r\n").unwrap().1, most.as_bytes());
    assert_eq!(in_chunks("1\r\n").err(), Some(Answer::ContentTooLarge));
}

#[test]
fn every_prefix_breaks_off() {
    let whole = WHOLE.len() - b"GET / HTTP/1.1\r\n".len();
    assert_eq!(parse(b"").err(), Some(Answer::Gone));
    for length in 1..whole {
        assert!(matches!(parse(&WHOLE[..length]), Err(Malformed(_))), "{length}");
    }
}

#[test]
fn every_byte_flipped_is_taken_or_refused() {
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
fn targets() {
    let table = [
        ("GET /", Some(("/", "", None))),
        ("GET /?", Some(("/", "", None))),
        ("GET /run?a=b?c", Some(("/run", "a=b?c", None))),
        ("GET //run", Some(("//run", "", None))),
        ("GET /a://b", Some(("/a://b", "", None))),
        ("GET http://h", Some(("/", "", Some("h")))),
        ("GET http://h?q", Some(("/", "q", Some("h")))),
        ("GET hTTp://h:1/run?q", Some(("/run", "q", Some("h:1")))),
        ("OPTIONS *", Some(("*", "", None))),
        ("OPTIONS http://h", Some(("*", "", Some("h")))),
        ("OPTIONS http://h/", Some(("/", "", Some("h")))),
        ("CONNECT h:1", Some(("*", "", None))),
        ("GET *", None),
        ("GET h:1", None),
        ("GET https://h/", None),
        ("GET run", None),
        ("GET ?a", None),
        ("GET h/run", None),
        ("GET ", None),
        ("OPTIONS */", None),
    ];
    for (line, expected) in table {
        let mut head = Head::default();
        let parsed = head.parse_line(&format!("{line} HTTP/1.1"));
        let parts = parsed
            .ok()
            .map(|()| (head.path.as_str(), head.query.as_str(), head.authority.as_deref()));
        assert_eq!(parts, expected, "{line}");
    }
}

#[test]
fn limits_are_exact() {
    let line = |length: usize| format!("GET /{} HTTP/1.1\r\n", "x".repeat(length - 14));
    let request = |line: &str, rest: &str| parse(format!("{line}{rest}\r\n").as_bytes()).map(drop);
    assert_eq!(request(&line(LONGEST_LINE), ""), Ok(()));
    assert_eq!(request(&line(LONGEST_LINE + 1), ""), Err(Answer::LineTooLong));
    let head = |length: usize| {
        format!("A: {}\r\n", "x".repeat(length - "GET / HTTP/1.1\r\nA: \r\n\r\n".len()))
    };
    assert_eq!(request("GET / HTTP/1.1\r\n", &head(LONGEST_HEAD)), Ok(()));
    assert_eq!(request("GET / HTTP/1.1\r\n", &head(LONGEST_HEAD + 1)), Err(Answer::HeadTooLarge));
    assert_eq!(request("GET / HTTP/1.1\r\n", &"A:\r\n".repeat(MOST_FIELDS)), Ok(()));
    assert_eq!(
        request("GET / HTTP/1.1\r\n", &"A:\r\n".repeat(MOST_FIELDS + 1)),
        Err(Answer::HeadTooLarge)
    );
    // Without an end they are refused as soon as they are too long.
    assert_eq!(parse(&[b'x'; LONGEST_LINE + 2]).err(), Some(Answer::LineTooLong));
}

#[test]
fn chunk_sizes() {
    let table = [
        ("0", Some(0)),
        ("a", Some(10)),
        ("00000000000000000000F", Some(15)),
        ("ffffffffffffffff", Some(u64::MAX)),
        ("5;x", Some(5)),
        ("5 ; x=\"y\"", Some(5)),
        ("10000000000000000", None),
        ("", None),
        (";x", None),
        ("+5", None),
        ("-5", None),
        ("0x5", None),
        ("5 5", None),
        ("5 ", None),
        (" 5", None),
        ("5;\u{1}", None),
    ];
    for (line, size) in table {
        let input = format!("{line}\r\n\r\n");
        let mut content = Content::new(input.as_bytes());
        content.next = Next::ChunkSize;
        let read = content.advance().ok();
        assert_eq!(read.map(|()| content.left), size, "{line:?}");
    }
}

/// Whitespace is what the grammar calls so: no other of Unicode's is taken off, and nothing is a coding too.
#[test]
fn codings_are_compared_to_the_letter() {
    for (value, expected) in [
        (&b" \tCHUNKED\t "[..], Ok(())),
        (b"chunked\x85", Err(Answer::Coding)),
        (b"\xa0chunked", Err(Answer::Coding)),
        (b"chunked;x", Err(Answer::Coding)),
        (b"", Err(Answer::Coding)),
        (b"chunked,", Err(MALFORMED_CHUNK)),
    ] {
        let head = b"POST / HTTP/1.1\r\nTransfer-Encoding:";
        let request = [&head[..], value, b"\r\n\r\n"].concat();
        let read = Content::new(&request[..]).read_head(&mut Head::default());
        assert_eq!(read, expected, "{value:?}");
    }
}

#[test]
fn a_chunk_s_end_is_looked_at() {
    for broken in [
        "5\r\nhello",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhellox\r\n0\r\n\r\n",
        "4\r\nhello\r\n0\r\n\r\n",
        "0\r\nno field\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n",
    ] {
        let request = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{broken}");
        assert!(parse(request.as_bytes()).is_err(), "{broken:?}");
    }
}

/// What has come with the head shows before anything is started that the content is malformed.
#[test]
fn a_first_chunk_is_looked_at_with_the_head() {
    for (begun, read) in [
        ("", Ok(())),
        ("5\r\n", Ok(())),
        ("0\r\n\r\n", Ok(())),
        ("zz\r\n", Err(MALFORMED_CHUNK)),
        ("zz\r\n0\r\n\r\n", Err(MALFORMED_CHUNK)),
        ("\r\n", Err(MALFORMED_CHUNK)),
    ] {
        let request = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{begun}");
        let mut content = Content::new(request.as_bytes());
        assert_eq!(content.read_head(&mut Head::default()), read, "{begun:?}");
    }
}

#[test]
fn forms() {
    let command = |form: &[u8]| form_value(form, b"command");
    assert_eq!(command(b"a=b&command=x+%2B%00&c"), Ok(Some(b"x +\0".to_vec())));
    assert_eq!(command(b"%63ommand=x"), Ok(Some(b"x".to_vec())));
    assert_eq!(command(b"command=a=b"), Ok(Some(b"a=b".to_vec())));
    assert_eq!(command(b"command"), Ok(Some(Vec::new())));
    assert_eq!(command(b"Command=x&%=y&comman%64%=z"), Ok(None));
    assert_eq!(command(b""), Ok(None));
    for broken in
        [&b"command=%"[..], b"command=%a", b"command=%g0", b"command=a&command=b", b"command=%+1"]
    {
        assert!(command(broken).is_err(), "{broken:?}");
    }
    let every: String = (0..=255).map(|byte| format!("%{byte:02x}")).collect();
    assert_eq!(command(format!("command={every}").as_bytes()), Ok(Some((0..=255).collect())));
}
