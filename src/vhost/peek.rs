//! Looking at a vhost-user message before it is handled.
//!
//! Crate `vhost` blocks on a partial message and handles a whole one at once. So the socket thread
//! looks first: a message is only handed over when all its bytes are there, and after the rings it
//! concerns were stopped. The back-end channel's descriptor is taken here as well, because the
//! crate's own type cannot send CONFIG_CHANGE.

use crate::base::codec::Reader;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, fstatfs};
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Bytes of a message header: request, flags, size.
const HEADER_BYTES: usize = 12;

/// Bytes of a message body at most, as crate `vhost` has it.
const BODY_BYTES_MAX: u32 = 4096;

/// Bytes of unread replies after which a peer is taken for dead.
const UNREAD_BYTES_MAX: i32 = 64 << 10;

/// File systems whose files are another process's or another host's: FUSE, NFS, SMB (three kinds),
/// 9P, Ceph.
const REMOTE: [FsType; 7] = [
    FUSE_SUPER_MAGIC,
    NFS_SUPER_MAGIC,
    SMB_SUPER_MAGIC,
    FsType(0xff53_4d42),
    FsType(0xfe53_4d42),
    FsType(0x0102_1997),
    FsType(0x00c3_6400),
];

/// Requests of the protocol that the socket thread must know.
pub mod request {
    pub const SET_FEATURES: u32 = 2;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// The rings that a message changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touches {
    None,
    One(u16),
    All,
}

/// What the socket holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peeked {
    /// Not all of the next message is there yet.
    Partial,
    /// The peer has closed, or broke the protocol.
    Closed,
    Message {
        request: u32,
        touches: Touches,
    },
}

fn queued_bytes(stream: &UnixStream, direction: u64) -> i32 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests write one int to the given address, and the descriptor is open.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), direction as _, &mut bytes) };
    if result == 0 { bytes } else { 0 }
}

/// Nothing more will come from the peer.
fn hung_up(stream: &UnixStream) -> bool {
    let half_closed = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut poll = [PollFd::new(stream.as_fd(), half_closed)];
    let ready = nix::poll::poll(&mut poll, PollTimeout::ZERO);
    ready.is_ok_and(|count| count > 0)
}

/// Looks at the next message without taking it.
pub fn peek(stream: &UnixStream) -> Peeked {
    match look(stream) {
        // The rest of a partial message never comes from a peer that is gone.
        Peeked::Partial if hung_up(stream) => Peeked::Closed,
        peeked => peeked,
    }
}

fn look(stream: &UnixStream) -> Peeked {
    if queued_bytes(stream, libc::TIOCOUTQ) > UNREAD_BYTES_MAX {
        return Peeked::Closed;
    }
    let mut bytes = [0; HEADER_BYTES + 8];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let length = match recv(stream.as_raw_fd(), &mut bytes, flags) {
        Ok(0) => return Peeked::Closed,
        Ok(length) => length,
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Peeked::Partial,
        Err(_) => return Peeked::Closed,
    };
    let mut reader = Reader::new(bytes.get(..length).unwrap_or_default());
    let (Some(request), Some(_flags), Some(size)) = (reader.u32(), reader.u32(), reader.u32())
    else {
        return Peeked::Partial;
    };
    if size > BODY_BYTES_MAX {
        return Peeked::Closed;
    }
    if queued_bytes(stream, libc::FIONREAD) < HEADER_BYTES as i32 + size as i32 {
        return Peeked::Partial;
    }
    Peeked::Message { request, touches: touches(request, reader.u32(), reader.u32()) }
}

fn touches(request: u32, index: Option<u32>, value: Option<u32>) -> Touches {
    let one = |index: Option<u32>| match index.map(u16::try_from) {
        Some(Ok(index)) => Touches::One(index),
        _ => Touches::All,
    };
    match request {
        request::SET_VRING_NUM
        | request::SET_VRING_ADDR
        | request::SET_VRING_BASE
        | request::GET_VRING_BASE => one(index),
        // Bits above the low byte say that there is no descriptor.
        request::SET_VRING_KICK => one(index.map(|index| index & 0xff)),
        request::SET_VRING_ENABLE if value == Some(1) => Touches::None,
        request::SET_VRING_ENABLE => one(index),
        request::SET_FEATURES
        | request::RESET_OWNER
        | request::SET_MEM_TABLE
        | request::SET_LOG_BASE
        // With its write cache off a guest may rely on what it submits after the answer.
        | request::SET_CONFIG
        | request::GET_INFLIGHT_FD
        | request::SET_INFLIGHT_FD
        | request::RESET_DEVICE
        | request::ADD_MEM_REG
        | request::REM_MEM_REG => Touches::All,
        _ => Touches::None,
    }
}

/// A duplicate of the one descriptor that comes with the next message.
pub fn peek_descriptor(stream: &UnixStream) -> Option<OwnedFd> {
    let mut descriptors = peek_descriptors(stream);
    if descriptors.len() == 1 { descriptors.pop() } else { None }
}

/// Duplicates of the descriptors that come with the next message, if one of them is of a file that
/// belongs to another process or another host. Whoever closes such a file may wait for that one, so
/// they must be closed where nobody waits; and memory of such a file could stop a reactor.
pub fn peek_unwelcome(stream: &UnixStream) -> Vec<OwnedFd> {
    let mut descriptors = peek_descriptors(stream);
    if !descriptors.iter().any(is_remote) {
        descriptors.clear();
    }
    descriptors
}

/// A FUSE server is not asked for this unless it is of the daemon's own user.
fn is_remote(descriptor: &OwnedFd) -> bool {
    let found = fstatfs(descriptor);
    found.map_or(true, |found| REMOTE.contains(&found.filesystem_type()))
}

/// The kernel duplicates descriptors for each look.
fn peek_descriptors(stream: &UnixStream) -> Vec<OwnedFd> {
    let mut header = [0; HEADER_BYTES];
    let mut vector = [IoSliceMut::new(&mut header)];
    let mut space = nix::cmsg_space!([RawFd; 32]);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut vector, Some(&mut space), flags);
    let mut descriptors = Vec::new();
    let controls = message.as_ref().ok().and_then(|message| message.cmsgs().ok());
    for control in controls.into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    fn message(request: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::from(request.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_message_is_seen_only_when_all_of_it_is_there() {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        let mut body = vec![3, 0, 0, 0, 1, 0, 0, 0];
        let bytes = message(request::SET_VRING_NUM, &body);
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(peek(&ours), Peeked::Partial, "{at} bytes");
            peer.write_all(&[*byte]).unwrap();
        }
        let seen = Peeked::Message { request: request::SET_VRING_NUM, touches: Touches::One(3) };
        assert_eq!(peek(&ours), seen);
        assert_eq!(peek(&ours), seen, "looking takes nothing");
        drop(peer);
        let (mut peer, ours) = UnixStream::pair().unwrap();
        body.resize(5000, 0);
        peer.write_all(&message(request::SET_MEM_TABLE, &body)).unwrap();
        assert_eq!(peek(&ours), Peeked::Closed, "larger than any message");
    }

    #[test]
    fn a_closed_peer_is_seen() {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        peer.write_all(&message(request::SET_VRING_NUM, &[0; 8])[..13]).unwrap();
        assert_eq!(peek(&ours), Peeked::Partial);
        drop(peer);
        assert_eq!(peek(&ours), Peeked::Closed, "the rest will never come");
    }

    #[test]
    fn the_descriptor_is_duplicated_and_stays_with_the_message() {
        let (peer, ours) = UnixStream::pair().unwrap();
        let (mut far, near) = UnixStream::pair().unwrap();
        let bytes = message(request::SET_BACKEND_REQ_FD, &[]);
        peer.send_with_fd(&bytes[..], near.as_raw_fd()).unwrap();
        drop(near);
        let taken = peek_descriptor(&ours).expect("one descriptor");
        let mut buffer = [0; 64];
        let (_, received) = ours.recv_with_fd(&mut buffer).unwrap();
        assert!(received.is_some(), "the message still carries it");
        far.write_all(b"x").unwrap();
        assert_eq!(nix::unistd::read(&taken, &mut buffer), Ok(1));
    }
}
