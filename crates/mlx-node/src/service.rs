//! `mlx-node service`: runs `serve` at login, through the user's own launchd (macOS) or systemd (Linux). No root.
//!
//! What the system is to run is a text made from paths alone; the commands that tell the system of it are a list. Both
//! are the same wherever they are made, so that a test on one system sees those of the other.
#![expect(clippy::print_stdout, reason = "what the commands print is their result")]

use crate::{
    config::{self, Config, ConfigError},
    settings::{Settings, SettingsError},
};
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// launchd's name for the agent, and the name of its file.
const LABEL: &str = "mlx-cluster.mlx-node";
/// systemd's name for the unit, and the name of its file.
const UNIT: &str = "mlx-node.service";
/// Descriptors: the endpoint's 4096 connections, and files and sockets beside them. macOS' default is 256.
const DESCRIPTORS_MAX: u32 = 8192;
/// Between two starts of one that failed: a download that fails is not tried again at once.
const RESTART_PAUSE_S: u32 = 10;
/// Beyond `drain_timeout`, before the system ends the process by force.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Why a service was not installed, removed or looked at.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServiceError {
    #[error(
        "no configuration file is there: a service has neither flags nor variables, so write \
         ~/.config/mlx-cluster/cluster.toml (cluster.example.toml lists the settings) or name one with --config"
    )]
    NoFile,
    #[error("a service takes its settings from {} alone: write them there instead of giving flags", .0.display())]
    Flags(PathBuf),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("HOME names no folder")]
    NoHome,
    #[error("{}: a path that a service's file cannot hold (not UTF-8, or with control characters)", .0.display())]
    Path(PathBuf),
    #[error("{} is there already: `mlx-node service uninstall` removes it", .0.display())]
    Installed(PathBuf),
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{manager} is not to be had for this user ({said}); start `mlx-node serve` by other means")]
    NoManager { manager: &'static str, said: String },
    #[error("`{command}` failed: {said}")]
    Refused { command: String, said: String },
}

impl ServiceError {
    /// Whether settings are at fault, rather than the system.
    pub(crate) fn is_usage(&self) -> bool {
        matches!(self, Self::NoFile | Self::Flags(_) | Self::Config(_) | Self::Settings(_))
    }
}

/// Who starts programs for a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    Launchd,
    Systemd,
}

/// What is to be started.
#[derive(Debug)]
struct Job {
    program: String,
    config: String,
    /// Where relative paths of the configuration begin: its own folder.
    folder: String,
    /// Where launchd puts the log; systemd has a journal.
    log: String,
    stop_time: Duration,
}

/// The user for whom this is.
#[derive(Debug)]
struct Account {
    home: PathBuf,
    uid: u32,
    init: Init,
}

/// Installs the service and starts it.
///
/// # Errors
/// Settings that `serve` would refuse, a service that is there already, a system that does not take it; nothing is left
/// of it then.
pub(crate) fn install(file: Option<&Path>, flags: &Config) -> Result<(), ServiceError> {
    let used = config::used_file(file).ok_or(ServiceError::NoFile)?;
    if !flags.is_empty() {
        return Err(ServiceError::Flags(used));
    }
    // As the service will read it: no flags, no variables.
    let settings = Settings::resolve(config::load(Some(&used), Config::default(), std::iter::empty())?)?;
    let account = Account::here()?;
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |error| ServiceError::File { path, error }
    };
    let config = fs::canonicalize(&used).map_err(failed(&used))?;
    let program = std::env::current_exe().map_err(failed(Path::new("mlx-node")))?;
    let job = Job {
        folder: plain(config.parent().unwrap_or_else(|| Path::new("/")))?,
        program: plain(&program)?,
        config: plain(&config)?,
        log: plain(&account.home.join("Library/Logs/mlx-node.log"))?,
        stop_time: settings.drain_timeout + STOP_GRACE,
    };
    let path = account.file();
    if path.exists() {
        return Err(ServiceError::Installed(path));
    }
    account.ask_manager()?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed(folder))?;
    }
    fs::write(&path, account.init.text(&job)).map_err(failed(&path))?;
    for command in account.start() {
        if let Err(error) = said_by(&command) {
            for command in account.stop() {
                // It may not have got as far as there being something to stop.
                let _ = said_by(&command);
            }
            // What is told is why it did not start.
            let _ = fs::remove_file(&path);
            return Err(error);
        }
    }
    println!("installed {}", path.display());
    println!("it runs {} serve --config {}, now and at every login", job.program, job.config);
    match account.init {
        Init::Launchd => println!("log: {}", job.log),
        Init::Systemd => {
            println!("log: journalctl --user -u {UNIT}");
            println!("to have it run while you are not logged in: loginctl enable-linger");
        }
    }
    Ok(())
}

/// Stops the service, which drains, and removes it. That there is none is fine.
///
/// # Errors
/// A file that cannot be removed.
pub(crate) fn uninstall() -> Result<(), ServiceError> {
    let account = Account::here()?;
    let path = account.file();
    if !path.exists() {
        println!("not installed: {} is not there", path.display());
        return Ok(());
    }
    for command in account.stop() {
        // One that does not run cannot be stopped; it is removed all the same.
        if let Err(error) = said_by(&command) {
            println!("{error}");
        }
    }
    fs::remove_file(&path).map_err(|error| ServiceError::File { path: path.clone(), error })?;
    println!("removed {}; settings, key and models are left as they are", path.display());
    if account.init == Init::Systemd {
        said_by(&systemctl(&["daemon-reload"]))?;
    }
    Ok(())
}

/// Says whether the service is installed and runs; whether it runs.
///
/// # Errors
/// A user without a home.
pub(crate) fn status() -> Result<bool, ServiceError> {
    let account = Account::here()?;
    let path = account.file();
    if !path.exists() {
        println!("not installed ({} is not there)", path.display());
        return Ok(false);
    }
    let (runs, said) = match said_by(&account.look()) {
        Ok(said) => (account.init.runs(&said), said),
        Err(error) => (false, error.to_string()),
    };
    println!("installed: {}", path.display());
    if runs {
        println!("runs");
    } else {
        println!("does not run: {}", said.lines().next().unwrap_or_default());
    }
    Ok(runs)
}

impl Account {
    fn here() -> Result<Self, ServiceError> {
        let home = std::env::var_os("HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = home.ok_or(ServiceError::NoHome)?;
        // The owner of one's home is oneself.
        let uid = fs::metadata(&home).map_err(|_| ServiceError::NoHome)?.uid();
        let init = if cfg!(target_os = "macos") { Init::Launchd } else { Init::Systemd };
        Ok(Self { home, uid, init })
    }

    /// Where the system looks for what a user wants started.
    fn file(&self) -> PathBuf {
        match self.init {
            Init::Launchd => self.home.join(format!("Library/LaunchAgents/{LABEL}.plist")),
            Init::Systemd => {
                // `folder` is ~/.config/mlx-cluster, or where XDG_CONFIG_HOME puts that.
                let own = config::folder().and_then(|folder| folder.parent().map(Path::to_path_buf));
                own.unwrap_or_else(|| self.home.join(".config")).join("systemd/user").join(UNIT)
            }
        }
    }

    fn domain(&self) -> String {
        format!("gui/{}", self.uid)
    }

    /// Asks the manager something harmless before anything is written.
    fn ask_manager(&self) -> Result<(), ServiceError> {
        let (manager, command) = match self.init {
            Init::Launchd => ("launchd", words(&["launchctl", "print", &self.domain()])),
            Init::Systemd => ("systemd", systemctl(&["show-environment"])),
        };
        match said_by(&command) {
            Ok(_) => Ok(()),
            Err(error) => Err(ServiceError::NoManager { manager, said: error.to_string() }),
        }
    }

    fn start(&self) -> Vec<Vec<String>> {
        match self.init {
            Init::Launchd => {
                vec![words(&["launchctl", "bootstrap", &self.domain(), &self.file().to_string_lossy()])]
            }
            Init::Systemd => vec![systemctl(&["daemon-reload"]), systemctl(&["enable", "--now", UNIT])],
        }
    }

    fn stop(&self) -> Vec<Vec<String>> {
        match self.init {
            Init::Launchd => vec![words(&["launchctl", "bootout", &format!("{}/{LABEL}", self.domain())])],
            Init::Systemd => vec![systemctl(&["disable", "--now", UNIT])],
        }
    }

    fn look(&self) -> Vec<String> {
        match self.init {
            Init::Launchd => words(&["launchctl", "print", &format!("{}/{LABEL}", self.domain())]),
            Init::Systemd => systemctl(&["show", "--property", "ActiveState", UNIT]),
        }
    }
}

impl Init {
    /// Whether an answer to [`Account::look`] means that the program runs.
    fn runs(self, said: &str) -> bool {
        let line = match self {
            Self::Launchd => "state = running",
            Self::Systemd => "ActiveState=active",
        };
        said.lines().any(|said| said.trim() == line)
    }

    /// The file that the system reads.
    fn text(self, job: &Job) -> String {
        let stop_s = job.stop_time.as_secs();
        match self {
            Self::Launchd => {
                let [program, config, folder, log] =
                    [&job.program, &job.config, &job.folder, &job.log].map(|text| xml(text));
                format!(
                    r#"<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>Label</key><string>{LABEL}</string>
  <key>ProgramArguments</key>
  <array><string>{program}</string><string>serve</string><string>--config</string><string>{config}</string></array>
  <key>WorkingDirectory</key><string>{folder}</string>
  <key>RunAtLoad</key><true/>
  <key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
  <key>ThrottleInterval</key><integer>{RESTART_PAUSE_S}</integer>
  <key>ExitTimeOut</key><integer>{stop_s}</integer>
  <key>ProcessType</key><string>Interactive</string>
  <key>SoftResourceLimits</key><dict><key>NumberOfFiles</key><integer>{DESCRIPTORS_MAX}</integer></dict>
  <key>StandardErrorPath</key><string>{log}</string>
</dict>
</plist>
"#
                )
            }
            Self::Systemd => {
                let [program, config] = [&job.program, &job.config].map(|text| word(text));
                // A folder is a text to the end of the line, not a word.
                let folder = job.folder.replace('%', "%%");
                format!(
                    "[Unit]
Description=One OpenAI-compatible endpoint out of the machines on a network

[Service]
ExecStart={program} serve --config {config}
WorkingDirectory={folder}
Restart=on-failure
RestartSec={RESTART_PAUSE_S}
# Settings that are wrong do not get better by trying again.
RestartPreventExitStatus=2
# The node is asked to drain; its engine ends with it.
KillMode=mixed
TimeoutStopSec={stop_s}
LimitNOFILE={DESCRIPTORS_MAX}

[Install]
WantedBy=default.target
"
                )
            }
        }
    }
}

/// A path as a text that fits into one line.
fn plain(path: &Path) -> Result<String, ServiceError> {
    let text = path.to_str().filter(|text| !text.chars().any(char::is_control));
    text.map(str::to_owned).ok_or_else(|| ServiceError::Path(path.to_path_buf()))
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// One word of systemd's command lines, which know quotes, backslashes, `%` for specifiers and `$` for variables.
fn word(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{text}\"")
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn systemctl(arguments: &[&str]) -> Vec<String> {
    words(&[&["systemctl", "--user"], arguments].concat())
}

/// Runs a command to its end; what it printed, or why it failed.
fn said_by(command: &[String]) -> Result<String, ServiceError> {
    let refused = |said: String| ServiceError::Refused { command: command.join(" "), said };
    let (program, arguments) = command.split_first().expect("a command has a program");
    let output =
        Command::new(program).args(arguments).output().map_err(|error| refused(error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(refused(said.lines().next().map_or_else(|| output.status.to_string(), str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(folder: &str) -> Job {
        Job {
            program: format!("{folder}/bin/mlx-node"),
            config: format!("{folder}/cluster.toml"),
            folder: folder.to_owned(),
            log: format!("{folder}/mlx-node.log"),
            stop_time: Duration::from_secs(70),
        }
    }

    #[test]
    fn files_hold_paths_as_their_readers_want_them() {
        let check = |init: Init, folder: &str, lines: &[&str]| {
            let text = init.text(&job(folder));
            for line in lines {
                assert!(text.lines().any(|l| l.trim() == *line), "{line:?} is not in\n{text}");
            }
        };
        check(
            Init::Systemd,
            "/opt/x",
            &[
                r#"ExecStart="/opt/x/bin/mlx-node" serve --config "/opt/x/cluster.toml""#,
                "WorkingDirectory=/opt/x",
                "TimeoutStopSec=70",
                "KillMode=mixed",
                "WantedBy=default.target",
            ],
        );
        check(
            Init::Systemd,
            r#"/a b/50%/$x/"q"\"#,
            &[
                r#"ExecStart="/a b/50%%/$$x/\"q\"\\/bin/mlx-node" serve --config "/a b/50%%/$$x/\"q\"\\/cluster.toml""#,
                r#"WorkingDirectory=/a b/50%%/$x/"q"\"#,
            ],
        );
        check(
            Init::Launchd,
            "/accounts/a & b/<x>",
            &[
                "<key>Label</key><string>mlx-cluster.mlx-node</string>",
                "<array><string>/accounts/a &amp; b/&lt;x&gt;/bin/mlx-node</string><string>serve</string>\
                 <string>--config</string><string>/accounts/a &amp; b/&lt;x&gt;/cluster.toml</string></array>",
                "<key>WorkingDirectory</key><string>/accounts/a &amp; b/&lt;x&gt;</string>",
                "<key>StandardErrorPath</key><string>/accounts/a &amp; b/&lt;x&gt;/mlx-node.log</string>",
                "<key>ExitTimeOut</key><integer>70</integer>",
            ],
        );
    }

    #[test]
    fn commands_name_the_user_and_the_service() {
        let check = |init, start: &[&str], stop: &str, look: &str| {
            let account = Account { home: PathBuf::from("/accounts/ada"), uid: 501, init };
            let joined = |commands: Vec<Vec<String>>| -> Vec<String> {
                commands.iter().map(|command| command.join(" ")).collect()
            };
            assert_eq!(joined(account.start()), start);
            assert_eq!(joined(account.stop()), [stop]);
            assert_eq!(account.look().join(" "), look);
        };
        check(
            Init::Launchd,
            &["launchctl bootstrap gui/501 /accounts/ada/Library/LaunchAgents/mlx-cluster.mlx-node.plist"],
            "launchctl bootout gui/501/mlx-cluster.mlx-node",
            "launchctl print gui/501/mlx-cluster.mlx-node",
        );
        check(
            Init::Systemd,
            &["systemctl --user daemon-reload", "systemctl --user enable --now mlx-node.service"],
            "systemctl --user disable --now mlx-node.service",
            "systemctl --user show --property ActiveState mlx-node.service",
        );
    }

    #[test]
    fn running_is_told_from_the_rest() {
        let check =
            |init: Init, said: &str, expected: bool| assert_eq!(init.runs(said), expected, "{said:?}");
        check(Init::Launchd, "gui/501/x = {\n\tactive count = 1\n\tstate = running\n}", true);
        check(Init::Launchd, "gui/501/x = {\n\tstate = not running\n\tlast exit code = 2\n}", false);
        check(Init::Systemd, "ActiveState=active\n", true);
        check(Init::Systemd, "ActiveState=activating\n", false);
        check(Init::Systemd, "ActiveState=inactive\n", false);
    }

    #[test]
    fn paths_that_would_break_a_line_are_refused() {
        assert!(matches!(plain(Path::new("/a\nExecStartPre=x")), Err(ServiceError::Path(_))));
        assert_eq!(plain(Path::new("/ä b")).ok().as_deref(), Some("/ä b"));
    }
}
