//! The command line: what each module below is told.

use crate::refusal::{error_text, shown};
use crate::{policy::Allowed, policy::Rules, run::Limits};
use std::{fs, net::SocketAddr, slice::Iter, time::Duration};

/// What the server is to do.
pub struct Config {
    pub rules: Rules,
    pub limits: Limits,
    listen: Option<SocketAddr>,
    token_file: Option<String>,
    no_token: bool,
}

/// Why the program ends before it serves: its exit status and what it says. 2 is a wrong command
/// line, 1 something that it asks for and that cannot be had.
pub struct Exit(pub u8, pub String);

/// Cargo.toml's version, by hand: a build by rustc alone has no `CARGO_PKG_VERSION`.
pub const VERSION: &str = "ssecommander 0.1.0\n";

impl Config {
    /// Reads the arguments, without the program's name.
    pub fn parse(args: &[String]) -> Result<Config, Exit> {
        let limits = Limits {
            max_commands: 128,
            timeout: Duration::ZERO,
            grace: Duration::from_secs(2),
            heartbeat: Duration::from_secs(15),
            stall: Duration::from_secs(60),
            verbose: false,
        };
        let rules = Rules::default();
        let mut config = Config { rules, limits, listen: None, token_file: None, no_token: false };
        let mut args = args.iter();
        while let Some(argument) = args.next() {
            if let Err(what) = config.take(argument, &mut args) {
                // What follows an --allow may be the rest of its command line.
                let quote = "; after --allow, quote the whole command line";
                let hint = if config.rules.allowed.is_empty() { "" } else { quote };
                let argument = shown(argument.as_bytes());
                return Err(Exit(2, format!("{argument}: {what}{hint}; see --help")));
            }
        }
        if let Some(path) = &config.token_file {
            config.rules.token = Some(read_token(path)?);
        }
        // Without a token, only who is on this host may call.
        let is_exposed = !config.address().ip().to_canonical().is_loopback();
        let admits_any_page = config.rules.origins.iter().any(|origin| origin == "*");
        if (is_exposed || admits_any_page) && config.rules.token.is_none() && !config.no_token {
            let danger = format!("anybody, or any page, could call {}", config.address());
            return Err(Exit(1, format!("{danger}; give --token-file, or --no-token if meant")));
        }
        Ok(config)
    }

    /// Where to listen.
    pub fn address(&self) -> SocketAddr {
        self.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3000)))
    }

    /// Takes an option; its value is behind `=`, or the next one of `args`. Fails with what it has
    /// to be.
    fn take(&mut self, argument: &str, args: &mut Iter<String>) -> Result<(), &'static str> {
        let (name, given) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (argument, None),
        };
        let mut value = || given.or_else(|| args.next().map(String::as_str)).unwrap_or_default();
        match name {
            "-l" | "--listen" if self.listen.is_some() => return Err("it may be given once"),
            "-l" | "--listen" => self.listen = Some(parse_address(value())?),
            "--allow" => self.rules.allowed.push(parse_allowed(value())?),
            "--allow-origin" => self.rules.origins.push(parse_origin(value())?),
            "--token-file" => self.token_file = Some(parse_path(value())?),
            "--max-commands" => self.limits.max_commands = parse_count(value())?,
            "--timeout" => self.limits.timeout = parse_seconds(value())?,
            "--grace" => self.limits.grace = parse_seconds(value())?,
            "--heartbeat" => self.limits.heartbeat = parse_seconds(value())?,
            "--stall" => self.limits.stall = parse_seconds(value())?,
            "-h" | "--help" | "-V" | "--version" => return Err("it stands alone"),
            "--no-token" | "-v" | "--verbose" if given.is_some() => return Err("it has no value"),
            "--no-token" => self.no_token = true,
            "-v" | "--verbose" => self.limits.verbose = true,
            _ => return Err("there is no such option"),
        }
        // By default neither is 0.
        if self.limits.heartbeat.is_zero() || self.limits.stall.is_zero() {
            return Err("it needs more than 0 seconds");
        }
        Ok(())
    }
}

fn parse_address(text: &str) -> Result<SocketAddr, &'static str> {
    let port = text.strip_prefix("localhost:").unwrap_or(text);
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit());
    let address = if is_port { format!("127.0.0.1:{port}") } else { text.to_string() };
    address.parse().map_err(|_| "it needs IP:PORT, [IPv6]:PORT, localhost:PORT or PORT")
}

fn parse_path(text: &str) -> Result<String, &'static str> {
    if text.is_empty() { Err("it needs a file") } else { Ok(text.to_string()) }
}

fn parse_allowed(text: &str) -> Result<Allowed, &'static str> {
    // /commands lists one a line.
    if text.contains(['\n', '\r']) {
        return Err("it needs a command line on one line");
    }
    Allowed::parse(text).map_err(|_| "it needs a command line, quoted as a whole")
}

fn parse_count(text: &str) -> Result<usize, &'static str> {
    match text.parse() {
        // std would take a sign.
        Ok(number) if number > 0 && !text.starts_with('+') => Ok(number),
        _ => Err("it needs a number from 1"),
    }
}

/// Plain decimal seconds, at most a year.
fn parse_seconds(text: &str) -> Result<Duration, &'static str> {
    // std would take a sign, an exponent, `inf` and `nan`.
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    match text.parse() {
        Ok(seconds) if is_plain && seconds <= 31_536_000.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("it needs seconds, at most 31536000"),
    }
}

/// `scheme://host[:port]`, as in the `Origin` field (RFC 6454 section 7), or `*`.
fn parse_origin(text: &str) -> Result<String, &'static str> {
    let (_, host) = text.split_once("://").unwrap_or_default();
    if text != "*" && (host.is_empty() || host.contains('/')) {
        return Err("it needs an origin as browsers send it (https://ops.example), or *");
    }
    // As browsers write it.
    Ok(text.to_ascii_lowercase())
}

/// The first line of a file: visible ASCII, as it has to fit a field.
fn read_token(path: &str) -> Result<String, Exit> {
    let cannot = |why: &str| Exit(1, format!("--token-file {path}: {why}"));
    let content = fs::read_to_string(path).map_err(|error| cannot(&error_text(&error)))?;
    let token = content.lines().next().unwrap_or("").trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(cannot("the token is empty, or not visible ASCII"));
    }
    Ok(token.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::response::USAGE;

    /// What options make: `STATUS WORDS` where they are wrong.
    fn parse(line: &[&str]) -> Result<Config, String> {
        let args: Vec<String> = line.iter().map(|argument| argument.to_string()).collect();
        Config::parse(&args).map_err(|Exit(status, why)| format!("{status} {why}"))
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
        assert_eq!(VERSION, format!("ssecommander {}\n", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn the_usage_fits_a_terminal() {
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
                assert_eq!(parse(line).unwrap().address().to_string(), expected);
            }
        }
        assert_eq!(parse(&[]).unwrap().address().to_string(), "127.0.0.1:3000");
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
    }

    #[test]
    fn origins_are_written_as_browsers_do() {
        let config = parse(&["--allow-origin", "HTTPS://Ops.example:8443"]).unwrap();
        assert_eq!(config.rules.origins, ["https://ops.example:8443"]);
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
