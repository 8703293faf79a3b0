//! The command line, as what each room below is told.

use crate::{policy::Allowed, policy::Rules, run::Limits};
use std::net::{Ipv4Addr, SocketAddr};
use std::{ffi::OsString, fs, time::Duration};

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
pub const USAGE: &str = include_str!("usage.txt");

const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// An option's value, or what it has to be.
type Parsed<T> = Result<T, &'static str>;

impl Wish {
    /// Reads the arguments, without the program's name.
    pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Wish, Exit> {
        let mut texts = Vec::new();
        for argument in args {
            // Made into text with losses, it could name another file, or admit another command.
            let text = argument.into_string().map_err(|argument| {
                wrong(&format!("{} is not UTF-8", argument.to_string_lossy()))
            })?;
            texts.push(text);
        }
        match texts.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["-h" | "--help"] => Ok(Wish::Print(USAGE.to_string())),
            ["-V" | "--version"] => Ok(Wish::Print(format!("ssecommander {VERSION}\n"))),
            _ => Config::parse(&texts).map(Wish::Serve),
        }
    }
}

impl Config {
    fn parse(args: &[String]) -> Result<Config, Exit> {
        let mut address = None;
        let mut rules = Rules::default();
        let mut limits = Limits {
            max_commands: 128,
            timeout: Duration::ZERO,
            grace: Duration::from_secs(2),
            heartbeat: Duration::from_secs(15),
            stall: Duration::from_secs(60),
            verbose: false,
        };
        let (mut token_file, mut no_token) = (None, false);
        let mut options =
            Options { args: args.iter(), name: "", value: None, follows_allow: false };
        while let Some(name) = options.next() {
            match name {
                "-l" | "--listen" => options.once(&mut address, parse_address)?,
                "--token-file" => options.once(&mut token_file, parse_path)?,
                "--allow" => rules.allowed.push(options.value(parse_allowed)?),
                "--allow-origin" => rules.origins.push(options.value(parse_origin)?),
                "--max-commands" => limits.max_commands = options.value(parse_count)?,
                "--timeout" => limits.timeout = options.value(parse_seconds)?,
                "--grace" => limits.grace = options.value(parse_seconds)?,
                "--heartbeat" => limits.heartbeat = options.value(parse_some_seconds)?,
                "--stall" => limits.stall = options.value(parse_some_seconds)?,
                "--no-token" => no_token = options.flag()?,
                "-v" | "--verbose" => limits.verbose = options.flag()?,
                "-h" | "--help" | "-V" | "--version" => {
                    return Err(options.wrong(&format!("{name} stands alone")));
                }
                _ => return Err(options.wrong(&format!("no option {name}"))),
            }
        }
        if let Some(path) = token_file {
            rules.token = Some(read_token(&path)?);
        }
        let config = Config {
            address: address.unwrap_or((Ipv4Addr::LOCALHOST, 3000).into()),
            rules,
            limits,
        };
        if !no_token {
            config.check_exposure()?;
        }
        Ok(config)
    }

    /// Without a token, only who is on this host may call.
    fn check_exposure(&self) -> Result<(), Exit> {
        if self.rules.token.is_some() {
            return Ok(());
        }
        let danger = if !self.address.ip().to_canonical().is_loopback() {
            format!("exposed at {}", self.address)
        } else if self.rules.origins.iter().any(|origin| origin == "*") {
            "--allow-origin *".to_string()
        } else {
            return Ok(());
        };
        let remedy = "needs --token-file, or --no-token if anybody may run anything";
        Err(Exit(1, format!("{danger} {remedy}")))
    }
}

/// The arguments, an option at a time.
struct Options<'a> {
    args: std::slice::Iter<'a, String>,
    /// The option that was read last.
    name: &'a str,
    /// Its value, where it came as `--name=VALUE`.
    value: Option<&'a str>,
    /// Whether an `--allow` was read before, so that what is wrong may be the rest of its command line.
    follows_allow: bool,
}

impl<'a> Options<'a> {
    /// The name of the next option.
    fn next(&mut self) -> Option<&'a str> {
        self.follows_allow |= self.name == "--allow";
        let argument = self.args.next()?;
        (self.name, self.value) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (argument.as_str(), None),
        };
        Some(self.name)
    }

    /// The option's value, as `parse` takes it.
    fn value<T>(&mut self, parse: fn(&str) -> Parsed<T>) -> Result<T, Exit> {
        let given = self.value.or_else(|| self.args.next().map(String::as_str));
        let text = given.unwrap_or_default();
        parse(text).map_err(|what| self.wrong(&format!("{} needs {what}, not '{text}'", self.name)))
    }

    /// The same, for an option that may be given once.
    fn once<T>(&mut self, slot: &mut Option<T>, parse: fn(&str) -> Parsed<T>) -> Result<(), Exit> {
        let value = self.value(parse)?;
        if slot.replace(value).is_some() {
            return Err(self.wrong(&format!("{} is given twice", self.name)));
        }
        Ok(())
    }

    /// An option without a value.
    fn flag(&self) -> Result<bool, Exit> {
        match self.value {
            None => Ok(true),
            Some(_) => Err(self.wrong(&format!("{} has no value", self.name))),
        }
    }

    fn wrong(&self, why: &str) -> Exit {
        if self.follows_allow {
            return wrong(&format!("{why}; after --allow, quote the whole command line"));
        }
        wrong(why)
    }
}

/// A wrong command line, told in one line whatever it holds.
fn wrong(why: &str) -> Exit {
    let mut line = String::new();
    for character in why.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    Exit(2, line + "; see --help")
}

fn parse_address(text: &str) -> Parsed<SocketAddr> {
    let port = text.strip_prefix("localhost:").unwrap_or(text);
    let is_port_alone = port.bytes().all(|byte| byte.is_ascii_digit());
    let address = if is_port_alone { format!("127.0.0.1:{port}").parse() } else { text.parse() };
    address.map_err(|_| "IP:PORT, [IPv6]:PORT, localhost:PORT or PORT")
}

fn parse_path(text: &str) -> Parsed<String> {
    if text.is_empty() {
        return Err("a file");
    }
    Ok(text.to_string())
}

fn parse_allowed(text: &str) -> Parsed<Allowed> {
    // /commands lists one a line.
    if text.contains(['\n', '\r']) {
        return Err("a command line without a line's end");
    }
    Allowed::parse(text).map_err(|_| "a command line, quoted as a whole")
}

fn parse_count(text: &str) -> Parsed<usize> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(number) if is_plain && number > 0 => Ok(number),
        _ => Err("a number from 1"),
    }
}

/// Plain decimal seconds, at most a year: no sign, no exponent. What is below a nanosecond is dropped.
fn parse_seconds(text: &str) -> Parsed<Duration> {
    const WHAT: &str = "seconds, 0 to 31536000";
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) || whole.len() + fraction.len() == 0 {
        return Err(WHAT);
    }
    let mut nanos = 0;
    let mut unit = 100_000_000;
    for digit in fraction.bytes() {
        nanos += u32::from(digit - b'0') * unit;
        unit /= 10;
    }
    let seconds = if whole.is_empty() { "0" } else { whole };
    let time = Duration::new(seconds.parse().map_err(|_| WHAT)?, nanos);
    if time > YEAR {
        return Err(WHAT);
    }
    Ok(time)
}

fn parse_some_seconds(text: &str) -> Parsed<Duration> {
    match parse_seconds(text) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err("seconds, above 0 and up to 31536000"),
    }
}

/// `scheme://host[:port]`, as in the `Origin` field (RFC 6454 section 7), or `*`.
fn parse_origin(text: &str) -> Parsed<String> {
    let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.:[]_".contains(c);
    let is_part = |part: &str| !part.is_empty() && part.chars().all(is_good);
    match text.split_once("://") {
        Some((scheme, host)) if is_part(scheme) && is_part(host) => Ok(text.to_string()),
        None if text == "*" => Ok(text.to_string()),
        _ => Err("an origin as browsers send it (https://ops.example), or *"),
    }
}

/// The first line of a file: visible ASCII, as it has to fit a field.
fn read_token(path: &str) -> Result<String, Exit> {
    let cannot = |why: &str| Exit(1, format!("--token-file {path}: {why}"));
    let content = fs::read_to_string(path).map_err(|error| cannot(&error.to_string()))?;
    let token = content.lines().next().unwrap_or("").trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(cannot("the token is empty, or not visible ASCII"));
    }
    Ok(token.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str], token: Option<&str>) -> std::result::Result<Config, String> {
        let arguments = line.iter().map(|argument| argument.to_string());
        let parsed = Config::parse(arguments, token.map(str::to_string));
        parsed.map_err(|Exit(status, why)| format!("{status} {why}"))
    }

    #[test]
    fn the_version_is_the_package_s() {
        assert_eq!(VERSION, env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn addresses() {
        let table = [
            ("8080", "http://127.0.0.1:8080"),
            ("0", "http://127.0.0.1:0"),
            ("127.0.0.2:1", "http://127.0.0.2:1"),
            ("[::1]:65535", "http://[::1]:65535"),
            ("unix:/run/x", "unix:/run/x"),
        ];
        for (text, expected) in table {
            for line in [&["-l", text][..], &["--listen", text], &[&format!("--listen={text}")]] {
                assert_eq!(
                    parse(line, None).unwrap_or_else(|why| panic!("{why}")).address.to_string(),
                    expected
                );
            }
        }
        for text in [
            "",
            "65536",
            "-1",
            "x",
            "127.0.0.1",
            "127.1:80",
            "::1:80",
            "[::1]",
            "localhost:80",
            "unix:",
            "[127.0.0.1]:1",
        ] {
            assert!(
                parse(&["--listen", text], None).is_err_and(|why| why.starts_with("2 ")),
                "{text}"
            );
        }
    }

    #[test]
    fn seconds_are_plain_decimals() {
        let table =
            [("0.5", 500), ("1", 1000), ("31536000", 31_536_000_000), (".25", 250), ("3.", 3000)];
        for (text, millis) in table {
            let config = parse(&["--stall", text], None).unwrap_or_else(|why| panic!("{why}"));
            assert_eq!(config.limits.stall, Duration::from_millis(millis));
        }
        for text in
            ["", "-1", "+1", "1e3", "inf", "NaN", "31536001", "1s", "0x1", ".", "1.2.3", " 1"]
        {
            for option in ["--timeout", "--grace", "--heartbeat", "--stall"] {
                assert!(
                    parse(&[option, text], None).is_err_and(|why| why.starts_with("2 ")),
                    "{option} {text}"
                );
            }
        }
        for (option, good) in
            [("--timeout", true), ("--grace", true), ("--heartbeat", false), ("--stall", false)]
        {
            assert_eq!(parse(&[option, "0"], None).is_ok(), good, "{option}");
        }
    }

    #[test]
    fn wrong_options_are_named() {
        let table: &[(&[&str], &str)] = &[
            (&["--nope"], "--nope"),
            (&["run"], "run"),
            (&["--listen"], "--listen"),
            (&["--token-file"], "--token-file"),
            (&["--no-token=1"], "--no-token"),
            (&["--help=1"], "--help"),
            (&["--verbose=1"], "--verbose"),
            (&["--max-connections", "0"], "--max-connections"),
            (&["--max-connections", "-1"], "--max-connections"),
            (&["--allow", "a 'b"], "--allow"),
            (&["--allow", " "], "--allow"),
            (&["--allow-origin", "ops.example"], "--allow-origin"),
            (&["--allow-origin", "https://ops.example/"], "--allow-origin"),
            (&["--allow-origin", "null"], "--allow-origin"),
            (&["--listen=a\nb"], "--listen"),
        ];
        for (line, name) in table {
            let why = parse(line, None).err().unwrap_or_default();
            assert!(
                why.starts_with("2 ") && why.contains(name) && !why.contains('\n'),
                "{line:?}: {why}"
            );
        }
    }

    #[test]
    fn exposure_needs_a_token() {
        for address in
            ["0.0.0.0:1", "192.0.2.1:1", "[::]:1", "[2001:db8::1]:1", "[::ffff:192.0.2.1]:1"]
        {
            assert!(
                parse(&["-l", address], None).is_err_and(|why| why.starts_with("1 ")),
                "{address}"
            );
            assert!(parse(&["-l", address, "--no-token"], None).is_ok());
            assert!(parse(&["-l", address], Some("secret")).is_ok());
        }
        assert!(
            parse(&["-l", "127.9.9.9:1"], None).is_ok()
                && parse(&["-l", "[::ffff:127.0.0.1]:1"], None).is_ok()
        );
        assert!(parse(&["--allow-origin", "*"], None).is_err_and(|why| why.starts_with("1 ")));
        assert!(parse(&["--allow-origin=*", "--no-token"], None).is_ok());
        assert!(parse(&["--allow-origin=*"], Some("secret")).is_ok());
    }

    #[test]
    fn tokens() {
        let token =
            |text| parse(&[], Some(text)).map(|config| config.policy.token.unwrap_or_default());
        assert_eq!(token("secret"), Ok("secret".to_string()));
        assert_eq!(token("  secret \r\nrest"), Ok("secret".to_string()));
        for bad in ["", "  ", "\nsecret", "two words", "gr\u{fc}n"] {
            assert!(token(bad).is_err_and(|why| why.starts_with("1 ")), "{bad:?}");
        }
        assert!(
            parse(&["--token-file", "/nonexistent"], None).is_err_and(|why| why.starts_with("1 "))
        );
        assert!(
            parse(&["--token-file", "/nonexistent"], Some("secret"))
                .is_err_and(|why| why.starts_with("2 "))
        );
    }
}
