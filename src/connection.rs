//! The path of one connection: its requests and their answers, one after the other.

use crate::log::{self, quoted, quoted_as_sent};
use crate::output::Stream;
use crate::pipes::{TICK, is_passing};
use crate::policy::{CommandLine, Rules, Verdict};
use crate::refusal::{self, Refusal, ensure};
use crate::request::{Request, form_fields, percent_decode};
use crate::response::{CONTINUE, Context, PAGE, PAGE_FIELDS, PLAIN, USAGE};
use crate::run::{self, Limits};
use crate::sys;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// In which a head must have arrived whole, and a form, however it trickles; and a next request begun.
const ARRIVAL_TIME: Duration = Duration::from_secs(5);
/// How long a client may go on sending after an answer that ends the connection.
const LINGER_TIME: Duration = Duration::from_secs(2);
/// Of input. A silent stream holds one, and most heads fit.
const BUFFER: usize = 1 << 10;

/// Serves a client until it or the server ends the connection, or the connection fails.
pub fn serve(
    socket: &TcpStream,
    peer: SocketAddr,
    rules: &Rules,
    limits: &Limits,
) -> io::Result<()> {
    let local = socket.local_addr()?.ip().to_canonical();
    // Each wait is a tick, so that whoever waits sees what else has happened.
    socket.set_read_timeout(Some(TICK))?;
    socket.set_write_timeout(Some(TICK))?;
    // Without it a client that keeps the connection waits for its second answer for 40 ms.
    socket.set_nodelay(true)?;
    sys::notice_dead_peer(socket, limits.heartbeat, limits.stall);
    let deadline = Instant::now() + ARRIVAL_TIME;
    let input = BufReader::with_capacity(BUFFER, Input { socket, deadline });
    let mut connection = Connection { socket, peer, local, rules, limits, input };
    while connection.exchange() {
        // The next request may begin so late, and then has as much time as the first one.
        connection.allow(ARRIVAL_TIME);
        connection.input.fill_buf()?;
        connection.allow(ARRIVAL_TIME);
    }
    Ok(())
}

struct Connection<'a> {
    socket: &'a TcpStream,
    peer: SocketAddr,
    /// The address that it came in on.
    local: IpAddr,
    rules: &'a Rules,
    limits: &'a Limits,
    input: BufReader<Input<'a>>,
}

/// What a client sends, up to a deadline.
struct Input<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        try_until(self.deadline, || self.socket.read(buffer))
    }
}

/// Repeats a call that waits for a tick, until it has done something. Fails with `TimedOut` where the deadline
/// has passed, also for who sends a byte now and then; otherwise at the server's end.
fn try_until(deadline: Instant, mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    while Instant::now() < deadline {
        match call() {
            Err(error) if is_passing(&error) => {}
            done => return done,
        }
        if sys::is_ending() {
            return Err(ErrorKind::ConnectionAborted.into());
        }
    }
    Err(ErrorKind::TimedOut.into())
}

impl Connection<'_> {
    /// Lets the client send for `time` from now.
    fn allow(&mut self, time: Duration) {
        self.input.get_mut().deadline = Instant::now() + time;
    }

    /// A request and its answer. Returns whether another request may follow.
    fn exchange(&mut self) -> bool {
        let mut request = Request::default();
        let is_answered = match self.answer(&mut request) {
            Ok(is_answered) => is_answered,
            Err(refusal) if refusal == refusal::GONE => false,
            Err(refusal) => self.refuse(&request, &refusal),
        };
        let ends = request.ends_connection() || sys::is_ending();
        if is_answered && ends {
            self.linger();
        }
        is_answered && !ends
    }

    /// Reads a request into an empty one, and answers it, unless it is refused. Returns whether the client got
    /// the whole answer.
    fn answer(&mut self, request: &mut Request) -> Result<bool, Refusal> {
        request.read(&mut self.input)?;
        let verdict = self.rules.judge(request, self.local)?;
        if verdict == Verdict::ReadForm {
            self.read_form(request)?;
        }
        let context = self.context(request);
        let answer = match verdict {
            Verdict::Page if request.accepts("text/html") => context.whole(200, PAGE_FIELDS, PAGE),
            Verdict::Page => context.whole(200, PLAIN, USAGE.as_bytes()),
            Verdict::Commands => context.whole(200, PLAIN, self.rules.listed().as_bytes()),
            Verdict::Methods(methods) => context.methods(methods),
            // It tells an `EventSource` to stop (WHATWG HTML section 9.2.3).
            Verdict::Reconnect => context.head(204, ""),
            Verdict::Run(_) if request.method == "HEAD" => context.stream_head(),
            Verdict::Run(command) => return self.run(&context, &command),
            Verdict::ReadForm => {
                let command = self.rules.command(form_fields(&request.form)?)?;
                return self.run(&context, &command);
            }
        };
        Ok(self.write(&answer))
    }

    /// Reads the form that holds the command; the rules have let no long one pass.
    fn read_form(&mut self, request: &mut Request) -> Result<(), Refusal> {
        if request.expects_continue() && !self.write(CONTINUE.as_bytes()) {
            return Err(refusal::GONE);
        }
        self.allow(ARRIVAL_TIME);
        let length = request.content_length;
        (&mut self.input).take(length).read_to_end(&mut request.form)?;
        ensure(request.form.len() as u64 == length, refusal::CUT)
    }

    /// Runs a command. A POST's content is its standard input, unless it was the form.
    fn run(&mut self, context: &Context, command: &CommandLine) -> Result<bool, Refusal> {
        let (request, length) = (context.request, context.request.content_length);
        let mut head = context.stream_head();
        if request.form.is_empty() && request.expects_continue() {
            head.splice(..0, CONTINUE.bytes());
        }
        let content = self.input.buffer().chain(self.socket).take(length);
        let is_fed = request.form.is_empty() && length > 0 && request.method == "POST";
        let stream = Stream::new(request.wants_events(), request.minor_version > 0, head);
        let content = if is_fed { Some(content) } else { None };
        match run::run(command, content, self.socket, self.peer, self.limits, stream) {
            Err(refusal) if request.wants_events() && refusal.status != 503 => {
                Ok(self.write(&self.failed_stream(context, &refusal)))
            }
            done => done,
        }
    }

    /// The whole stream of a command that could not be started.
    fn failed_stream(&self, context: &Context, refusal: &Refusal) -> Vec<u8> {
        // By what a shell says so (XCU 2.8.2).
        let code = if refusal.status == 404 { 127 } else { 126 };
        let is_chunked = context.request.minor_version > 0;
        let mut stream = Stream::new(true, is_chunked, context.stream_head());
        stream.error(&refusal.words);
        let numbers = stream.exit("failed", Some(code), None, 0);
        let (peer, why) = (self.peer, quoted(refusal.words.as_bytes()));
        log::line(format_args!("exit peer={peer} pid=0 out=failed{numbers} why={why}"));
        stream.unsent
    }

    /// Refuses a request, and logs what was asked for: by the target, or by the form that was read.
    fn refuse(&mut self, request: &Request, refusal: &Refusal) -> bool {
        let context = self.context(request);
        let (peer, status) = (self.peer, refusal.status);
        let target = request.target.as_bytes();
        let mut asked = quoted_as_sent(target, &percent_decode(target).0);
        if !request.form.is_empty() {
            let form = percent_decode(&request.form).0;
            asked +=
                &format!(" command={}", quoted(form.strip_prefix(b"command=").unwrap_or(&form)));
        }
        let (why, _) = refusal.words.split_once("; ").unwrap_or_default();
        let why = quoted(why.as_bytes());
        log::line(format_args!("refuse peer={peer} status={status} target={asked} why={why}"));
        self.write(&context.refusal(refusal))
    }

    fn context<'r>(&self, request: &'r Request) -> Context<'r> {
        let origin = self.rules.foreign_origin(request);
        let closes = request.ends_connection() || sys::is_ending();
        Context { request, origin, closes }
    }

    /// Writes an answer whole, unless the client is gone, or does not read.
    fn write(&self, mut bytes: &[u8]) -> bool {
        let mut socket = self.socket;
        while !bytes.is_empty() {
            match try_until(Instant::now() + self.limits.stall, || socket.write(bytes)) {
                Ok(length) => bytes = &bytes[length..],
                Err(_) => return false,
            }
        }
        true
    }

    /// Ends the connection so that the answer survives: closing a socket with unread input sends a reset, which
    /// can overtake the answer and have it thrown away (RFC 9112 section 9.6). So the server says that nothing
    /// more comes, and reads what still does, for a moment.
    fn linger(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        self.allow(LINGER_TIME);
        let mut scratch = [0; 4096];
        while self.input.get_mut().read(&mut scratch).is_ok_and(|length| length > 0) {}
    }
}
