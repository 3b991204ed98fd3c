//! [`Link`]: a stage's two neighbours in the circle: frames and hidden states go to the next one, those of the one before
//! come in.
//!
//! Nothing is received before something is there to receive: who asks a ring's socket for bytes that are not there keeps a
//! core busy, which on a CPU computes an earlier pass meanwhile.

use super::{
    PipelineError,
    frame::{FRAME_WORDS, Frame},
    hello::HELLO_WORDS,
};
use crate::distributed::Group;
use mlx_rs::{Array, Dtype, error::Result as MlxResult, transforms::async_eval};
use std::time::Duration;

/// A member of a pipeline's group.
#[derive(Debug)]
pub(crate) struct Link {
    group: Group,
}

impl Link {
    pub(crate) fn new(group: Group) -> Self {
        Self { group }
    }

    pub(crate) fn rank(&self) -> usize {
        self.group.rank()
    }

    pub(crate) fn size(&self) -> usize {
        self.group.size()
    }

    pub(crate) fn is_last(&self) -> bool {
        self.rank() + 1 == self.size()
    }

    /// What each rank says, by rank.
    pub(crate) fn gather(&self, words: &[u32; HELLO_WORDS]) -> Result<Vec<Vec<u32>>, PipelineError> {
        let all = self.group.all_gather(&Array::from_slice(words, &[1, HELLO_WORDS as i32]))?;
        all.eval().map_err(|error| PipelineError::lost("greeting the others", &error))?;
        Ok(all.as_slice::<u32>().chunks(HELLO_WORDS).map(<[u32]>::to_vec).collect())
    }

    /// Sends an array to the next rank, of the last one to the first, once it is there.
    pub(crate) fn send(&self, array: &Array) -> Result<(), PipelineError> {
        let next = (self.rank() + 1) % self.size();
        let lost = |error| PipelineError::lost("sending to the next rank", &error);
        let sent = self.group.send(&array.contiguous().map_err(lost)?, next)?;
        async_eval([&sent]).map_err(lost)
    }

    pub(crate) fn send_frame(&self, frame: &Frame) -> Result<(), PipelineError> {
        let (first, rest) = frame.split();
        self.send(&Array::from_slice(&first, &[first.len() as i32]))?;
        if rest.is_empty() {
            return Ok(());
        }
        self.send(&Array::from_slice(rest, &[rest.len() as i32]))
    }

    /// The same, on its way when this returns: the last frame, after which the process may end.
    pub(crate) fn send_last(&self, frame: &Frame) -> Result<(), PipelineError> {
        let (first, _) = frame.split();
        let next = (self.rank() + 1) % self.size();
        let sent = self.group.send(&Array::from_slice(&first, &[first.len() as i32]), next)?;
        sent.eval().map_err(|error| PipelineError::lost("sending to the next rank", &error))
    }

    /// Waits for something from the rank before; false after `most` without.
    pub(crate) fn wait(&self, most: Option<Duration>) -> Result<bool, PipelineError> {
        Ok(self.group.wait_for_message(most)?)
    }

    /// Words from the rank before, which are as many as it sends.
    pub(crate) fn words(&self, count: usize) -> Result<Vec<u32>, PipelineError> {
        self.wait(None)?;
        let words = self.recv(&[count as i32], Dtype::Uint32)?;
        words.eval().map_err(|error| PipelineError::lost("receiving from the rank before", &error))?;
        Ok(words.as_slice::<u32>().to_vec())
    }

    /// The next frame of the rank before.
    pub(crate) fn frame(&self) -> Result<Frame, PipelineError> {
        let (mut frame, missing) = Frame::begin(&self.words(FRAME_WORDS)?)?;
        if missing > 0 {
            frame.words.extend(self.words(missing)?);
        }
        Ok(frame)
    }

    /// An array of the rank before: received once it is evaluated, which should wait for it with [`Self::arrived`].
    pub(crate) fn recv(&self, shape: &[i32], dtype: Dtype) -> Result<Array, PipelineError> {
        let before = (self.rank() + self.size() - 1) % self.size();
        Ok(self.group.recv(shape, dtype, before)?)
    }

    /// [`Self::wait`] as a pass needs it.
    pub(crate) fn arrived(&self) -> MlxResult<()> {
        let waited = self.group.wait_for_message(None);
        waited.map(|_| ()).map_err(|error| mlx_rs::error::Exception::custom(error.to_string()))
    }
}
