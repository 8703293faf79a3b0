//! A command line, split into words as a POSIX shell splits it (XCU 2.2, Quoting), with nothing
//! expanded: no variables, no patterns, no operators. Words are bytes, since file names are.

use crate::refusal::{self, Refusal, ensure};

/// The words of `line`, of which there is at least one: blanks and LF separate (a CR is a part of
/// its word), quotes and backslashes keep together. An unclosed quote, or a NUL, which no argument
/// can hold, is refused.
pub fn split(line: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
    let mut words = Vec::new();
    // The word that is being read, once it has begun: a pair of quotes begins one that may stay
    // empty.
    let mut word: Option<Vec<u8>> = None;
    // The quote that is open.
    let mut quote = None;
    let mut bytes = line.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        // A backslash before a line's end takes both away.
        if byte == b'\\' && quote != Some(b'\'') && bytes.next_if_eq(&b'\n').is_some() {
            continue;
        }
        if quote.is_none() && matches!(byte, b' ' | b'\t' | b'\n') {
            words.extend(word.take());
            continue;
        }
        let word = word.get_or_insert_default();
        match (quote, byte) {
            (None, b'\'' | b'"') => quote = Some(byte),
            (Some(open), _) if open == byte => quote = None,
            // A backslash with nothing after it stands for itself, as in a shell.
            (None, b'\\') => word.push(bytes.next().unwrap_or(byte)),
            (Some(b'"'), b'\\') => {
                let special = bytes.next_if(|next| b"\"\\$`".contains(next));
                word.push(special.unwrap_or(byte));
            }
            _ => word.push(byte),
        }
    }
    words.extend(word);
    ensure(!words.is_empty(), refusal::COMMAND)?;
    ensure(quote.is_none(), refusal::QUOTE)?;
    ensure(!line.contains(&0), refusal::NUL)?;
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::split;

    fn words(line: &str) -> Vec<String> {
        split(line.as_bytes())
            .unwrap()
            .into_iter()
            .map(|word| String::from_utf8(word).unwrap())
            .collect()
    }

    #[test]
    fn splits_as_a_shell_does() {
        let table: &[(&str, &[&str])] = &[
            ("ls", &["ls"]),
            ("  ls \t -l\n", &["ls", "-l"]),
            ("''", &[""]),
            ("a '' \"\" b", &["a", "", "", "b"]),
            ("'a b'c\"d e\"", &["a bcd e"]),
            (r"'a\b'", &[r"a\b"]),
            (r#""\" \\ \$ \` \n \'""#, &[r#"" \ $ ` \n \'"#]),
            (r"a\ b \'c\' \\ \n", &["a b", "'c'", r"\", "n"]),
            (r"a\", &[r"a\"]),
            (r"\", &[r"\"]),
            ("a\\\nb \\\n c \"d\\\ne\" 'f\\\ng'", &["ab", "c", "de", "f\\\ng"]),
            ("ls \\\n-l", &["ls", "-l"]),
            ("'it'\\''s'", &["it's"]),
            ("$HOME *.rs ~ a;b|c&d>e #f", &["$HOME", "*.rs", "~", "a;b|c&d>e", "#f"]),
            ("a\rb\u{b}c", &["a\rb\u{b}c"]),
            ("größe 'ü x'", &["größe", "ü x"]),
        ];
        for (line, expected) in table {
            assert_eq!(words(line), *expected, "{line:?}");
        }
        assert_eq!(split(b"\xff '\xfe'").unwrap(), [b"\xff", b"\xfe"]);
    }

    #[test]
    fn refuses_open_quotes_and_nul() {
        for line in [
            "", " \t\n ", "\\\n", "'", "\"", "a 'b", "a \"b", "\"\\\"", "\"\\", "'a\\'b'", "'''",
            "\0", "a '\0'",
        ] {
            assert!(split(line.as_bytes()).is_err(), "{line:?}");
        }
    }

    /// The real shell is the judge of what needs no expansion.
    #[test]
    fn agrees_with_sh() {
        let alphabet = [" ", "a", "'", "\"", "\\", "$ ", "-"];
        for number in 0..7_usize.pow(5) {
            let line: String =
                (0..5).map(|place| alphabet[number / 7_usize.pow(place) % 7]).collect();
            // A shell asks for more after a last backslash.
            if number % 97 != 0 || line.ends_with('\\') || line.trim().is_empty() {
                continue;
            }
            let script = format!("for word in {line}; do printf '%s\\0' \"$word\"; done");
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            match split(line.as_bytes()) {
                Ok(words) => {
                    let expected: Vec<u8> =
                        words.iter().flat_map(|word| [word, &b"\0"[..]].concat()).collect();
                    assert_eq!(output.stdout, expected, "{line:?}");
                }
                Err(_) => assert!(!output.status.success(), "{line:?}"),
            }
        }
    }
}
