//! Who may speak with the daemon. The only test of its file: a program that was just copied cannot
//! be run while another thread's child may still hold it open.

mod daemon;

use daemon::Daemon;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Output;
use vflash::control::http::Access;

/// The command line as user and group 65534, copied to where that user may read it.
fn as_nobody(daemon: &Daemon) -> Output {
    std::fs::set_permissions(daemon.folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = daemon.path("vflash");
    std::fs::copy(env!("CARGO_BIN_EXE_vflash"), &program).unwrap();
    let mut command = std::process::Command::new(program);
    command.arg("--run-dir").arg(daemon.path("run")).arg("status").uid(65534).gid(65534);
    command.output().unwrap()
}

#[test]
fn another_user_is_refused_unless_of_the_group() {
    // Only root can become another user; what is decided is tested beside the decision as well.
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("left out: needs root");
    }
    let daemon = Daemon::start(Access { group: None });
    let refused = as_nobody(&daemon);
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("Permission denied") && text.contains("--api-group"), "{text}");
    // Even where the file's permissions let everybody in.
    let socket = daemon.path("run/api.sock");
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
    let refused = as_nobody(&daemon);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("user 65534 may not use the API"), "{text}");
    assert_eq!(refused.status.code(), Some(1));

    let daemon = Daemon::start(Access { group: Some(65534) });
    let allowed = as_nobody(&daemon);
    assert!(allowed.status.success(), "{allowed:?}");
}
