//! The command line, as what each room below is told.

use crate::refusal::{shown, words_of};
use crate::{policy::Allowed, policy::Rules, response::USAGE, run::Limits};
use std::{ffi::OsString, fs, net::SocketAddr, time::Duration};

/// What the server is to do.
pub struct Config {
    pub address: SocketAddr,
    pub rules: Rules,
    pub limits: Limits,
}

/// What the arguments ask for.
pub enum Wish {
    Serve(Config),
    /// Nothing but this text on stdout.
    Print(String),
}

/// Why the program ends before it serves: its exit status and what it says. 2 is a wrong command line, 1
/// something that it asks for and that cannot be had.
#[derive(Debug, PartialEq)]
pub struct Exit(pub u8, pub String);

/// The same as in Cargo.toml, which a build by rustc alone does not see.
pub const VERSION: &str = "0.1.0";

const YEAR: f64 = 365.0 * 86_400.0;

/// An option's value, or what it has to be.
type Parsed<T> = Result<T, &'static str>;

impl Wish {
    /// Reads the arguments, without the program's name.
    pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Wish, Exit> {
        // Made into text with losses, an argument could name another file, or admit another command.
        let args: Result<Vec<String>, OsString> = args.map(OsString::into_string).collect();
        let not_text = |argument| Exit(2, format!("{argument:?} is not UTF-8; see --help"));
        let args = args.map_err(not_text)?;
        match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["-h" | "--help"] => Ok(Wish::Print(USAGE.to_string())),
            ["-V" | "--version"] => Ok(Wish::Print(format!("ssecommander {VERSION}\n"))),
            _ => parse_options(&args).map(Wish::Serve),
        }
    }
}

fn parse_options(args: &[String]) -> Result<Config, Exit> {
    let (mut address, mut token_file, mut no_token) = (None, None, false);
    let mut rules = Rules::default();
    let mut limits = Limits {
        max_commands: 128,
        timeout: Duration::ZERO,
        grace: Duration::from_secs(2),
        heartbeat: Duration::from_secs(15),
        stall: Duration::from_secs(60),
        verbose: false,
    };
    let mut args = args.iter().map(String::as_str);
    while let Some(argument) = args.next() {
        let (name, given) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (argument, None),
        };
        // What follows an --allow may be the rest of its command line.
        let quote = "; after --allow, quote the whole command line";
        let hint = if rules.allowed.is_empty() { "" } else { quote };
        let mut value = || given.or_else(|| args.next()).unwrap_or_default();
        let parsed = match name {
            "-l" | "--listen" if address.is_some() => Err("it may be given once"),
            "-l" | "--listen" => parse_address(value()).map(|new| address = Some(new)),
            "--token-file" if token_file.is_some() => Err("it may be given once"),
            "--token-file" => parse_path(value()).map(|new| token_file = Some(new)),
            "--no-token" => parse_flag(given).map(|new| no_token = new),
            "--allow" => parse_allowed(value()).map(|new| rules.allowed.push(new)),
            "--allow-origin" => parse_origin(value()).map(|new| rules.origins.push(new)),
            "--max-commands" => parse_count(value()).map(|new| limits.max_commands = new),
            "--timeout" => parse_seconds(value()).map(|new| limits.timeout = new),
            "--grace" => parse_seconds(value()).map(|new| limits.grace = new),
            "--heartbeat" => parse_some_seconds(value()).map(|new| limits.heartbeat = new),
            "--stall" => parse_some_seconds(value()).map(|new| limits.stall = new),
            "-v" | "--verbose" => parse_flag(given).map(|new| limits.verbose = new),
            "-h" | "--help" | "-V" | "--version" => Err("it stands alone"),
            _ => Err("there is no such option"),
        };
        if let Err(what) = parsed {
            let line = format!("{argument}: {what}{hint}; see --help");
            return Err(Exit(2, shown(line.as_bytes())));
        }
    }
    if let Some(path) = token_file {
        rules.token = Some(read_token(path)?);
    }
    let address = address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3000)));
    // Without a token, only who is on this host may call.
    let is_exposed = !address.ip().to_canonical().is_loopback();
    let admits_any_page = rules.origins.iter().any(|origin| origin == "*");
    if (is_exposed || admits_any_page) && rules.token.is_none() && !no_token {
        let danger = if is_exposed { address.to_string() } else { "--allow-origin *".to_string() };
        let remedy = "needs --token-file, or --no-token if anybody may run anything";
        return Err(Exit(1, format!("{danger} {remedy}")));
    }
    Ok(Config { address, rules, limits })
}

fn parse_flag(given: Option<&str>) -> Parsed<bool> {
    if given.is_some() { Err("it has no value") } else { Ok(true) }
}

fn parse_address(text: &str) -> Parsed<SocketAddr> {
    let port = text.strip_prefix("localhost:").unwrap_or(text);
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit());
    let address = if is_port { format!("127.0.0.1:{port}") } else { text.to_string() };
    address.parse().map_err(|_| "it needs IP:PORT, [IPv6]:PORT, localhost:PORT or PORT")
}

fn parse_path(text: &str) -> Parsed<&str> {
    if text.is_empty() { Err("it needs a file") } else { Ok(text) }
}

fn parse_allowed(text: &str) -> Parsed<Allowed> {
    // /commands lists one a line.
    if text.contains(['\n', '\r']) {
        return Err("it needs a command line on one line");
    }
    Allowed::parse(text).map_err(|_| "it needs a command line, quoted as a whole")
}

fn parse_count(text: &str) -> Parsed<usize> {
    match text.parse() {
        // std would take a sign.
        Ok(number) if number > 0 && !text.starts_with('+') => Ok(number),
        _ => Err("it needs a number from 1"),
    }
}

/// Plain decimal seconds, at most a year.
fn parse_seconds(text: &str) -> Parsed<Duration> {
    // std would take a sign, an exponent, `inf` and `nan`.
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    match text.parse() {
        Ok(seconds) if is_plain && seconds <= YEAR => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("it needs seconds, at most 31536000"),
    }
}

fn parse_some_seconds(text: &str) -> Parsed<Duration> {
    let time = parse_seconds(text)?;
    if time.is_zero() { Err("it needs more than 0 seconds") } else { Ok(time) }
}

/// `scheme://host[:port]`, as in the `Origin` field (RFC 6454 section 7), or `*`.
fn parse_origin(text: &str) -> Parsed<String> {
    let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.:[]_".contains(c);
    let is_part = |part: &str| !part.is_empty() && part.chars().all(is_good);
    let (scheme, host) = text.split_once("://").unwrap_or_default();
    if text == "*" || (is_part(scheme) && is_part(host)) {
        return Ok(text.to_string());
    }
    Err("it needs an origin as browsers send it (https://ops.example), or *")
}

/// The first line of a file: visible ASCII, as it has to fit a field.
fn read_token(path: &str) -> Result<String, Exit> {
    let cannot = |why: &str| Exit(1, format!("--token-file {path}: {why}"));
    let content = fs::read_to_string(path).map_err(|error| cannot(&words_of(&error)))?;
    let token = content.lines().next().unwrap_or("").trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(cannot("the token is empty, or not visible ASCII"));
    }
    Ok(token.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    /// What options make: `STATUS WORDS` where they are wrong.
    fn parse(line: &[&str]) -> Result<Config, String> {
        match Wish::parse(line.iter().map(OsString::from)) {
            Ok(Wish::Serve(config)) => Ok(config),
            Ok(Wish::Print(text)) => Err(format!("0 {text}")),
            Err(Exit(status, why)) => Err(format!("{status} {why}")),
        }
    }

    fn is_wrong(line: &[&str], names: &str) {
        let why = parse(line).err().unwrap_or_default();
        let is_one_line = why.starts_with("2 ") && !why.contains('\n');
        assert!(is_one_line && why.contains(names), "{line:?}: {why}");
    }

    /// A token in a file of the test's own.
    fn with_token(content: &[u8]) -> Result<Option<String>, String> {
        let name = format!("ssecommander-token-{}-{}", std::process::id(), content.len());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, content).unwrap();
        let parsed = parse(&["--token-file", path.to_str().unwrap(), "--listen", "0.0.0.0:1"]);
        fs::remove_file(path).unwrap();
        parsed.map(|config| config.rules.token)
    }

    #[test]
    fn the_version_is_the_package_s() {
        assert_eq!(VERSION, env!("CARGO_PKG_VERSION"));
        assert_eq!(parse(&["-V"]).err().unwrap(), format!("0 ssecommander {VERSION}\n"));
    }

    #[test]
    fn the_usage_fits_a_terminal() {
        assert_eq!(parse(&["--help"]).err().unwrap(), format!("0 {USAGE}"));
        assert!(USAGE.lines().count() <= 60);
        assert!(USAGE.lines().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn addresses() {
        let table = [
            ("8080", "127.0.0.1:8080"),
            ("0", "127.0.0.1:0"),
            ("localhost:80", "127.0.0.1:80"),
            ("127.0.0.2:1", "127.0.0.2:1"),
            ("[::1]:65535", "[::1]:65535"),
        ];
        for (text, expected) in table {
            for line in [&["-l", text][..], &["--listen", text], &[&format!("--listen={text}")]] {
                assert_eq!(parse(line).unwrap().address.to_string(), expected);
            }
        }
        assert_eq!(parse(&[]).unwrap().address.to_string(), "127.0.0.1:3000");
        for text in [
            "",
            "65536",
            "-1",
            "+1",
            "x",
            "127.0.0.1",
            "127.1:80",
            "::1:80",
            "[::1]",
            "localhost",
            "localhost:",
            "localhost:+1",
            "otherhost:80",
            "unix:/run/x",
            "[127.0.0.1]:1",
        ] {
            is_wrong(&["--listen", text], "--listen");
        }
        is_wrong(&["--listen", "1", "-l", "2"], "once");
    }

    #[test]
    fn seconds_are_plain_decimals() {
        let table = [
            ("0.5", 500),
            ("1", 1000),
            ("31536000", 31_536_000_000),
            ("31536000.0", 31_536_000_000),
            (".25", 250),
            ("3.", 3000),
            ("1.0004", 1000),
        ];
        for (text, millis) in table {
            let stall = parse(&["--stall", text]).unwrap().limits.stall;
            assert_eq!(stall.as_millis(), millis, "{text}");
        }
        for text in [
            "",
            "-1",
            "+1",
            "1e3",
            "inf",
            "NaN",
            "31536001",
            "31536000.1",
            "1s",
            "0x1",
            ".",
            "1.2.3",
            " 1",
            "1.-5",
            "99999999999999999999",
        ] {
            for option in ["--timeout", "--grace", "--heartbeat", "--stall"] {
                is_wrong(&[option, text], option);
            }
        }
        for (option, may_be_zero) in
            [("--timeout", true), ("--grace", true), ("--heartbeat", false), ("--stall", false)]
        {
            assert_eq!(parse(&[option, "0"]).is_ok(), may_be_zero, "{option}");
        }
    }

    #[test]
    fn wrong_options_are_named() {
        let table: &[(&[&str], &str)] = &[
            (&["--nope"], "--nope"),
            (&["run"], "run"),
            (&[""], "no such option"),
            (&["--listen"], "--listen"),
            (&["--token-file"], "--token-file"),
            (&["--token-file="], "--token-file"),
            (&["--no-token=1"], "--no-token"),
            (&["--help=1"], "--help"),
            (&["--verbose=1"], "--verbose"),
            (&["--max-commands", "0"], "--max-commands"),
            (&["--max-commands", "-1"], "--max-commands"),
            (&["--max-commands", "+5"], "--max-commands"),
            (&["--max-connections", "5"], "--max-connections"),
            (&["--allow", "a 'b"], "--allow"),
            (&["--allow", " "], "--allow"),
            (&["--allow", "a\nb"], "--allow"),
            (&["--allow-origin", "ops.example"], "--allow-origin"),
            (&["--allow-origin", "https://ops.example/"], "--allow-origin"),
            (&["--allow-origin", "null"], "--allow-origin"),
            (&["--listen=a\nb"], "--listen"),
            (&["-h", "-V"], "stands alone"),
            (&["-v", "--version"], "stands alone"),
            (&["--allow", "df", "-h"], "quote the whole command line"),
            (&["--allow", "ls", "-l"], "quote the whole command line"),
            (&["--allow", "ls", "-la"], "quote the whole command line"),
            (&["--allow", "ls", "/tmp"], "quote the whole command line"),
        ];
        for (line, names) in table {
            is_wrong(line, names);
        }
        let not_text = OsString::from_vec(b"--token-file=\xff".to_vec());
        let wrong = Wish::parse([not_text].into_iter()).err().unwrap();
        assert!(wrong.0 == 2 && wrong.1.contains("UTF-8"), "{wrong:?}");
    }

    #[test]
    fn exposure_needs_a_token() {
        for address in
            ["0.0.0.0:1", "192.0.2.1:1", "[::]:1", "[2001:db8::1]:1", "[::ffff:192.0.2.1]:1"]
        {
            assert!(parse(&["-l", address]).is_err_and(|why| why.starts_with("1 ")), "{address}");
            assert!(parse(&["-l", address, "--no-token"]).is_ok());
        }
        assert!(parse(&["-l", "127.9.9.9:1"]).is_ok());
        assert!(parse(&["-l", "[::ffff:127.0.0.1]:1"]).is_ok());
        assert!(parse(&["--allow-origin", "*"]).is_err_and(|why| why.starts_with("1 ")));
        assert!(parse(&["--allow-origin=*", "--no-token"]).is_ok());
    }

    #[test]
    fn tokens() {
        assert_eq!(with_token(b"secret"), Ok(Some("secret".to_string())));
        assert_eq!(with_token(b"  secret \r\nrest"), Ok(Some("secret".to_string())));
        for bad in [&b""[..], b"  ", b"\nsecret", b"two words", "gr\u{fc}n".as_bytes(), b"\xff\xfe"]
        {
            assert!(with_token(bad).is_err_and(|why| why.starts_with("1 ")), "{bad:?}");
        }
        let missing = parse(&["--token-file", "/nonesuch"]).err().unwrap();
        assert!(missing.starts_with("1 --token-file /nonesuch: No such file"), "{missing}");
        assert!(!missing.contains("os error"), "{missing}");
    }
}
