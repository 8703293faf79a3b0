use super::*;

const STDOUT: usize = 0;
const STDERR: usize = 1;

/// The events of a stream, as (event, data) pairs, checked for their form and numbering.
fn events(stream: &[u8]) -> Vec<(String, String)> {
    let text = std::str::from_utf8(stream).unwrap();
    assert!(text.is_empty() || text.ends_with("\n\n"));
    let blocks = text.split_terminator("\n\n").enumerate();
    blocks
        .map(|(index, block)| {
            let lines: Vec<&str> = block.split('\n').collect();
            let [id, event, data] = lines[..] else { panic!("{block:?}") };
            let (millis, number) = id.strip_prefix("id: ").unwrap().split_once('-').unwrap();
            assert!(millis.parse::<u64>().unwrap() > 1_700_000_000_000);
            assert_eq!(number, (index + 1).to_string());
            (
                event.strip_prefix("event: ").unwrap().to_string(),
                data.strip_prefix("data: ").unwrap().to_string(),
            )
        })
        .collect()
}

/// What a JSON parser makes of the `out` of a piece's data.
fn unescape(data: &str) -> String {
    let inside = data.split_once("\"out\":\"").unwrap().1.strip_suffix("\"}").unwrap();
    let mut text = String::new();
    let mut characters = inside.chars();
    while let Some(character) = characters.next() {
        assert!(character >= ' ' && character != '"');
        if character != '\\' {
            text.push(character);
            continue;
        }
        text.push(match characters.next().unwrap() {
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'u' => {
                let hex: String = characters.by_ref().take(4).collect();
                let control = char::from_u32(u32::from_str_radix(&hex, 16).unwrap()).unwrap();
                assert!(control < ' ');
                control
            }
            escaped @ ('"' | '\\') => escaped,
            other => panic!("\\{other} in {data}"),
        });
    }
    text
}

fn stream() -> Stream {
    Stream::new(true, false, Vec::new())
}

/// All that was encoded and not yet sent.
fn sent(stream: &mut Stream) -> Vec<u8> {
    take(&mut stream.unsent)
}

fn decoded(pieces: &[&[u8]]) -> String {
    let mut stream = stream();
    for piece in pieces {
        stream.output(STDOUT, piece.to_vec());
    }
    stream.exit("exited", Some(0), None, 0);
    let mut events = events(&sent(&mut stream));
    assert_eq!(events.pop().map(|last| last.0).as_deref(), Some("exit"));
    let texts = events.iter().map(|(_, data)| unescape(data));
    texts.inspect(|text| assert!(!text.is_empty())).collect()
}

#[test]
fn the_contract_s_example() {
    let mut stream = stream();
    stream.start(4711, 15.0);
    stream.output(STDOUT, b"total 12\n".to_vec());
    stream.output(STDERR, b"ls: x: No such file or directory\n".to_vec());
    stream.event("err", "", "a \"word\"".as_bytes());
    stream.exit("exited", Some(2), None, 6);
    stream.exit("killed", None, Some(9), 7);
    let expected = [
        ("start", r#"{"type":"start","pid":4711,"heartbeat":15}"#),
        ("stdout", r#"{"type":"stdout","out":"total 12\n"}"#),
        ("stderr", r#"{"type":"stderr","out":"ls: x: No such file or directory\n"}"#),
        ("err", r#"{"type":"error","out":"a \"word\""}"#),
        (
            "exit",
            r#"{"type":"exit","out":"exited","code":2,"signal":null,"ms":6,"stdout_bytes":9,"stderr_bytes":33}"#,
        ),
        (
            "exit",
            r#"{"type":"exit","out":"killed","code":null,"signal":9,"ms":7,"stdout_bytes":9,"stderr_bytes":33}"#,
        ),
    ];
    let expected = expected.map(|(event, data)| (event.to_string(), data.to_string()));
    assert_eq!(events(&sent(&mut stream)), expected);
}

/// The counts of U+FFFD are those of browsers (Unicode 3.9, table 3-8 to 3-11, and the WHATWG
/// decoder's tests).
#[test]
fn invalid_bytes_become_the_browsers_count_of_replacements() {
    let table: &[(&[u8], &str)] = &[
        (b"\xff", "\u{fffd}"),
        (b"\x80\xbf", "\u{fffd}\u{fffd}"),
        (
            b"\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41",
            "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}A",
        ),
        (
            b"\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41",
            "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}A",
        ),
        (
            b"\xf4\x91\x92\x93\xff\x41\x80\xbf\x42",
            "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}A\u{fffd}\u{fffd}B",
        ),
        (b"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}A"),
        (b"\xe2\x82", "\u{fffd}"),
        (b"\xf0\x9f\x98", "\u{fffd}"),
        (b"\xc3\x0a\xc3\xa9", "\u{fffd}\n\u{e9}"),
        (b"\xef\xbb\xbfx", "\u{feff}x"),
    ];
    for (bytes, expected) in table {
        assert_eq!(decoded(&[bytes]), *expected, "{bytes:x?}");
        assert_eq!(String::from_utf8_lossy(bytes), *expected, "{bytes:x?}");
    }
}

#[test]
fn a_text_split_anywhere_decodes_the_same() {
    let text = "a\u{0}\u{1f} \"q\" \\ é € 😀\u{7f}\u{85}\u{2028}\r\n\t\u{8}\u{c}".as_bytes();
    let broken = b"\xe2\x82\xe2\x82\xac\xf0\x9f\xf0\x9f\x98\x80\xf0\x9f\x98\n\xc3\xc3\xa9\xed\xa0\x80\xff\xfe".as_slice();
    for bytes in [text, broken] {
        let whole = String::from_utf8_lossy(bytes);
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(decoded(&pieces), whole, "{first} {second}");
            }
        }
        let bytewise: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(decoded(&bytewise), whole);
    }
}

#[test]
fn stdout_and_stderr_carry_apart() {
    let mut stream = stream();
    stream.output(STDOUT, b"\xe2\x82".to_vec());
    stream.output(STDERR, b"\xc3".to_vec());
    assert_eq!(sent(&mut stream), b"");
    stream.output(STDOUT, b"\xac".to_vec());
    stream.output(STDERR, b"\xa9".to_vec());
    let expected = [
        ("stdout", "{\"type\":\"stdout\",\"out\":\"\u{20ac}\"}"),
        ("stderr", "{\"type\":\"stderr\",\"out\":\"\u{e9}\"}"),
    ];
    assert_eq!(
        events(&sent(&mut stream)),
        expected.map(|(event, data)| (event.to_string(), data.to_string()))
    );
}

#[test]
fn each_piece_is_a_chunk() {
    let mut stream = Stream::new(false, true, b"head ".to_vec());
    stream.output(STDOUT, [b'x'; 300].to_vec());
    stream.output(STDERR, b"y".to_vec());
    let expected = [b"head 12c\r\n", &[b'x'; 300][..], b"\r\n1\r\ny\r\n"].concat();
    assert_eq!(stream.unsent, expected);
    // What the client did not take stays, and the next chunk comes behind it.
    stream.unsent.drain(..300);
    stream.output(STDOUT, b"z".to_vec());
    let expected = [&expected[300..], b"1\r\nz\r\n"].concat();
    assert_eq!(sent(&mut stream), expected);
    stream.event("err", "", "not in plain text".as_bytes());
    assert_eq!(sent(&mut stream), b"");
    stream.exit("exited", Some(3), None, 0);
    assert_eq!(sent(&mut stream), b"0\r\nExit-Code: 3\r\n\r\n");
    assert!(stream.unsent.is_empty());
    let mut stream = Stream::new(false, true, Vec::new());
    stream.exit("killed", None, Some(15), 0);
    assert_eq!(sent(&mut stream), b"0\r\nExit-Signal: 15\r\n\r\n");
    let mut stream = Stream::new(false, true, Vec::new());
    stream.exit("left", None, None, 0);
    assert_eq!(sent(&mut stream), b"0\r\n\r\n");
    let mut stream = Stream::new(false, false, Vec::new());
    stream.output(STDOUT, b"old".to_vec());
    stream.exit("exited", Some(0), None, 0);
    assert_eq!(sent(&mut stream), b"old");
}

#[test]
fn silence_is_told_by_comments_or_by_zeros() {
    let mut stream = Stream::new(true, true, Vec::new());
    stream.output(STDOUT, b"\xc3".to_vec());
    assert_eq!(sent(&mut stream), b"");
    stream.comment();
    assert_eq!(sent(&mut stream), b"2\r\n:\n\r\n");
    let mut stream = Stream::new(false, true, Vec::new());
    (0..20).for_each(|_| stream.comment());
    assert_eq!(sent(&mut stream), b"00000000");
    stream.output(STDOUT, b"x".to_vec());
    assert_eq!(sent(&mut stream), b"1\r\nx\r\n");
    stream.comment();
    stream.exit("exited", Some(0), None, 0);
    assert_eq!(sent(&mut stream), b"00\r\nExit-Code: 0\r\n\r\n");
    let mut stream = Stream::new(false, false, Vec::new());
    stream.comment();
    assert_eq!(sent(&mut stream), b"");
}

#[test]
fn what_cannot_be_killed_has_no_number() {
    let mut stream = stream();
    stream.start(1, 0.5);
    stream.exit("left", None, None, 9);
    let expected = [
        ("start", r#"{"type":"start","pid":1,"heartbeat":0.5}"#),
        (
            "exit",
            r#"{"type":"exit","out":"left","code":null,"signal":null,"ms":9,"stdout_bytes":0,"stderr_bytes":0}"#,
        ),
    ];
    let expected = expected.map(|(event, data)| (event.to_string(), data.to_string()));
    assert_eq!(events(&sent(&mut stream)), expected);
}

/// Every byte at every place of a word, beside every neighbour that could borrow from it.
#[test]
fn the_search_finds_what_a_plain_one_finds() {
    let must_escape = |&byte: &u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    let neighbours = [0x1f, 0x20, 0x21, 0x22, 0x23, 0x5b, 0x5c, 0x5d, 0x7f, 0x80, 0xa2, 0xff];
    for length in 0..20 {
        for place in 0..length {
            for (byte, neighbour) in (0..=255).flat_map(|byte| neighbours.map(|each| (byte, each)))
            {
                let mut text = vec![b'x'; length];
                text[place] = byte;
                if let Some(after) = text.get_mut(place + 1) {
                    *after = neighbour;
                }
                let expected = text.iter().position(must_escape);
                assert_eq!(find_special(&text), expected, "{text:x?}");
            }
        }
    }
}

#[test]
fn controls_are_escaped_and_nothing_else() {
    let all: String = (0..0x500).filter_map(char::from_u32).collect();
    assert_eq!(decoded(&[all.as_bytes()]), all);
    let mut out = Vec::new();
    escape("\u{1f}\u{7f}\u{9f}/é\u{2028}".as_bytes(), &mut out);
    assert_eq!(out, "\\u001f\u{7f}\u{9f}/é\u{2028}".as_bytes());
}
