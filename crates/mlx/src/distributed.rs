//! Groups of processes that exchange arrays: `mx.distributed` for Rust.
//!
//! A [`Group`] is joined once in a process and for its whole life: MLX keeps one group for each backend, survivors of a
//! lost member hang in their next operation or fail, and nothing that was in flight comes back. So a process is a member
//! of one group, whoever started it watches its progress from outside, and a new group is made of new processes.
//!
//! Who is who comes from the environment, as MLX has it ([`RingPlace`] for the ring). Operations are lazy, like all of
//! MLX's: they take place when what they return is evaluated; what is sent goes in the order in which it was made, and what
//! is received comes so, each beside the other and beside what the device computes. A member that was lost is an error of the evaluation, where it is
//! noticed at all. Who waits for a message should do so with [`Group::wait_for_message`]: MLX itself asks a socket again and
//! again without a pause, with a whole core. The ring's sockets have neither encryption nor authentication; whoever can reach a port while the
//! group is being joined can spoil it.
#![expect(unsafe_code, reason = "calls of the C API, each with its conditions beside it")]

use crate::raw::{call, keep_errors, take_error};
use mlx_rs::{Array, Device, DeviceType, Dtype, Stream};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, fcntl_dupfd_cloexec},
    net::{getpeername, getsockname},
};
use std::{
    fmt,
    net::{SocketAddr, SocketAddrV4},
    os::fd::{BorrowedFd, OwnedFd},
    path::PathBuf,
    process::Command,
    time::Duration,
};

/// Descriptors among which a group's socket is looked for: it was opened early in a process's life.
const DESCRIPTORS_MAX: i32 = 1024;

/// Members of one group: what the ring's launch format, and any sensible cluster of Macs, has room for.
pub const MEMBERS_MAX: usize = 8;

/// How a group's members reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// TCP between neighbours; everywhere.
    Ring,
    /// RDMA over Thunderbolt 5; macOS 26.2 and later, where it was enabled.
    Jaccl,
}

impl Backend {
    fn name(self) -> &'static std::ffi::CStr {
        match self {
            Self::Ring => c"ring",
            Self::Jaccl => c"jaccl",
        }
    }

    /// Whether this build of MLX has it. Of JACCL this does not say that the machine's cables do.
    pub fn is_available(self) -> bool {
        keep_errors();
        // SAFETY: a C string that lives for ever.
        unsafe { mlx_sys::mlx_distributed_is_available(self.name().as_ptr()) }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ring => "ring",
            Self::Jaccl => "jaccl",
        })
    }
}

/// Why an operation on a group, or joining one, failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// MLX has no such backend here.
    #[error("this build of MLX has no distributed backend \"{backend}\"")]
    Unavailable {
        /// The backend asked for.
        backend: Backend,
    },
    /// The group did not come about.
    #[error("joining a group over \"{backend}\" failed: {message}")]
    Join {
        /// The backend asked for.
        backend: Backend,
        /// What MLX says.
        message: String,
    },
    /// There is nobody of that rank to speak to.
    #[error("rank {rank} is not a neighbour of rank {own} in a group of {size}")]
    NoNeighbour {
        /// The rank asked for.
        rank: usize,
        /// This process's.
        own: usize,
        /// Members.
        size: usize,
    },
    /// MLX refused an operation.
    #[error("{operation} failed: {message}")]
    Operation {
        /// Which.
        operation: &'static str,
        /// What MLX says.
        message: String,
    },
}

/// A ring as MLX is told of it: a process's rank, and a file with the addresses of all.
///
/// A member binds its own address and connects to the next one's. Behind proxies each member has a file of its own: its
/// address to bind, and beside it, as the next one's, where its proxy listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingPlace {
    /// This member's place, from 0.
    pub rank: usize,
    /// The file's path.
    pub hostfile: PathBuf,
}

impl RingPlace {
    /// What the file says: the addresses of all, by rank. MLX takes IPv4 only.
    pub fn hostfile(addresses: &[SocketAddrV4]) -> String {
        let rows: Vec<String> = addresses.iter().map(|address| format!("[\"{address}\"]")).collect();
        format!("[{}]", rows.join(","))
    }

    /// Gives a process that is to be started its place.
    pub fn apply(&self, command: &mut Command) {
        command.env("MLX_RANK", self.rank.to_string()).env("MLX_HOSTFILE", &self.hostfile);
    }
}

/// The connection by which the member before is heard: the one that was accepted at this member's own address.
fn inlet() -> Option<OwnedFd> {
    let rank: usize = std::env::var("MLX_RANK").ok()?.parse().ok()?;
    let hosts = std::fs::read_to_string(std::env::var_os("MLX_HOSTFILE")?).ok()?;
    let hosts: serde_json::Value = serde_json::from_str(&hosts).ok()?;
    let row = hosts.get(rank)?;
    let own = row.as_str().or_else(|| row.get(0)?.as_str())?;
    let own: SocketAddrV4 = own.parse().ok()?;
    (3..DESCRIPTORS_MAX).find_map(|number| {
        // SAFETY: only used while MLX, which never closes it while the group lives, holds it, or found not to be open.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        let port = SocketAddr::try_from(getsockname(descriptor).ok()?).ok()?.port();
        let connected = getpeername(descriptor).is_ok();
        (port == own.port() && connected).then(|| fcntl_dupfd_cloexec(descriptor, 3).ok())?
    })
}

/// This process's place among others. It belongs to the thread that joined it.
pub struct Group {
    handle: mlx_sys::mlx_distributed_group,
    rank: usize,
    size: usize,
    /// What is sent, and what is done together.
    outgoing: Stream,
    /// What is received: on a stream of its own, so that neither waits for the other, and the device for neither.
    incoming: Stream,
    /// Where the member before is heard, if that can be waited for.
    inlet: Option<OwnedFd>,
}

impl Group {
    /// Joins the group that the environment describes; returns once all members are there. A process does so once: asked
    /// again, MLX returns the first group, whatever the environment says by then.
    ///
    /// There is no time limit: where a member never starts, others wait for ever, so whoever started this process must
    /// end it.
    ///
    /// # Errors
    /// [`GroupError::Unavailable`], and [`GroupError::Join`] where the environment names no group, a port is taken or a
    /// neighbour was not there in time (the ring: 31 s).
    pub fn join(backend: Backend) -> Result<Self, GroupError> {
        if !backend.is_available() {
            return Err(GroupError::Unavailable { backend });
        }
        // SAFETY: an empty handle, filled below and freed with the group.
        let mut handle = unsafe { mlx_sys::mlx_distributed_group_new() };
        // SAFETY: a valid handle to be filled and a C string that lives for ever.
        let status = unsafe { mlx_sys::mlx_distributed_init(&mut handle, true, backend.name().as_ptr()) };
        if status != 0 {
            let message = take_error();
            // SAFETY: ours, and not used afterwards.
            unsafe { mlx_sys::mlx_distributed_group_free(handle) };
            return Err(GroupError::Join { backend, message });
        }
        // SAFETY: a live handle.
        let (rank, size) = unsafe {
            (mlx_sys::mlx_distributed_group_rank(handle), mlx_sys::mlx_distributed_group_size(handle))
        };
        let stream = || Stream::new_with_device(&Device::new(DeviceType::Cpu, 0));
        let (outgoing, incoming) = (stream(), stream());
        let inlet = match backend {
            Backend::Ring => inlet(),
            Backend::Jaccl => None,
        };
        Ok(Self { handle, rank: rank as usize, size: size as usize, outgoing, incoming, inlet })
    }

    /// Waits until the member before has sent something that was not received yet, or is lost, which receiving tells;
    /// false after `most` without. Where a backend's messages cannot be waited for, true at once.
    ///
    /// # Errors
    /// [`GroupError::Operation`].
    pub fn wait_for_message(&self, most: Option<Duration>) -> Result<bool, GroupError> {
        let Some(inlet) = &self.inlet else { return Ok(true) };
        let most = most.map(|most| Timespec {
            tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: most.subsec_nanos().into(),
        });
        loop {
            match poll(&mut [PollFd::new(inlet, PollFlags::IN)], most.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(GroupError::Operation { operation: "poll", message: error.to_string() });
                }
            }
        }
    }

    /// This process's place, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Members.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The sum of all members' arrays, which have the same shape and type.
    ///
    /// # Errors
    /// [`GroupError::Operation`].
    pub fn all_sum(&self, array: &Array) -> Result<Array, GroupError> {
        operation("all_sum", array, |res| {
            // SAFETY: `res` is to be filled; array, group and stream are live.
            unsafe {
                mlx_sys::mlx_distributed_all_sum(res, array.as_ptr(), self.handle, self.outgoing.as_ptr())
            }
        })
    }

    /// All members' arrays, which have the same shape and type, one after another along the first axis.
    ///
    /// # Errors
    /// [`GroupError::Operation`].
    pub fn all_gather(&self, array: &Array) -> Result<Array, GroupError> {
        operation("all_gather", array, |res| {
            // SAFETY: as in `all_sum`.
            unsafe {
                mlx_sys::mlx_distributed_all_gather(res, array.as_ptr(), self.handle, self.outgoing.as_ptr())
            }
        })
    }

    /// Sends an array to a neighbour: it is on its way once the array that is returned, the same one, is evaluated.
    ///
    /// # Errors
    /// [`GroupError::NoNeighbour`], [`GroupError::Operation`].
    pub fn send(&self, array: &Array, to: usize) -> Result<Array, GroupError> {
        let to = self.neighbour(to)?;
        operation("send", array, |res| {
            // SAFETY: as in `all_sum`.
            unsafe {
                mlx_sys::mlx_distributed_send(res, array.as_ptr(), to, self.handle, self.outgoing.as_ptr())
            }
        })
    }

    /// What a neighbour sends: shape and type must be those of what it does send.
    ///
    /// # Errors
    /// [`GroupError::NoNeighbour`], [`GroupError::Operation`].
    pub fn recv(&self, shape: &[i32], dtype: Dtype, from: usize) -> Result<Array, GroupError> {
        let from = self.neighbour(from)?;
        // Only its shape is told where that fails.
        let named = Array::from_int(0);
        operation("recv", &named, |res| {
            // SAFETY: as in `all_sum`; the shape outlives the call and carries its length.
            unsafe {
                mlx_sys::mlx_distributed_recv(
                    res,
                    shape.as_ptr(),
                    shape.len(),
                    dtype.into(),
                    from,
                    self.handle,
                    self.incoming.as_ptr(),
                )
            }
        })
    }

    /// Only neighbours, in a circle, have a connection.
    fn neighbour(&self, rank: usize) -> Result<i32, GroupError> {
        let (own, size) = (self.rank, self.size);
        let apart = (rank + size - own) % size.max(1);
        if rank >= size || rank == own || (apart != 1 && apart != size - 1) {
            return Err(GroupError::NoNeighbour { rank, own, size });
        }
        Ok(rank as i32)
    }
}

fn operation(
    name: &'static str,
    array: &Array,
    operation: impl FnOnce(*mut mlx_sys::mlx_array) -> i32,
) -> Result<Array, GroupError> {
    call(name, array, operation)
        .map_err(|error| GroupError::Operation { operation: name, message: error.what().to_owned() })
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: ours, and not used afterwards. MLX keeps the group itself.
        unsafe { mlx_sys::mlx_distributed_group_free(self.handle) };
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}
