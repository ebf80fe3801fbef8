// Prints what choose_topk takes: "sms largest type k rows columns | threads cluster held solo
// guesses guesses_candidates", where held is what the registers of one CTA hold and solo what one
// CTA of a cluster serves, in scores. Needs no GPU.
#include <cstdio>

#include "dsv4/topk/tuning.cuh"

using namespace dsv4;

template <class Policy>
int held_scores(int threads) {
  return threads * kUnit *
         (threads == 512 ? TopkConfig<Policy, 512, true>::kHeld
                         : TopkConfig<Policy, 256, true>::kHeld);
}

int main() {
  for (int sms : {78, 114, 132}) {
    for (int largest : {8, 16}) {
      const DeviceLimits device{sms, largest, 227 << 10};
      for (int type = 0; type < 4; ++type) {
        for (int k : {1, 512, 513, 1024, 1025, 2048}) {
          for (int rows = 1; rows <= 300; rows += rows < 140 ? 1 : 40) {
            for (int columns : {0, 1, 8192, 8193, 16384, 16385, 32768, 32769, 65536, 65537, 131072,
                                131073, 262144, 262145, 1048576, 2097152, 4194304, 8388608}) {
              TopkParams p{};
              p.rows = rows;
              p.columns = columns;
              p.logits_stride = columns;
              p.k = k;
              const auto score = static_cast<ScoreType>(type);
              const TopkChoice choice = choose_topk(p, score, device);
              const bool guesses = choice.shape == TopkShape::kGuess;
              const TopkChoice of_candidates = choose_topk(p, score, device, true);
              const int threads = choice.shape == TopkShape::k512 || guesses ? 512
                                  : choice.shape == TopkShape::k256          ? 256
                                                                             : 1024;
              const int held = threads == 1024                ? 0
                               : score == ScoreType::kFloat32 ? held_scores<Float32Keys>(threads)
                                                              : held_scores<Bfloat16Keys>(threads);
              std::printf("%d %d %d %d %d %lld | %d %d %d %d %d %d\n", sms, largest, type, k, rows,
                          static_cast<long long>(most_units(p, score)) * kUnit, threads,
                          choice.cluster, held, choice.solo_units * kUnit, guesses,
                          of_candidates.shape == TopkShape::kGuess);
            }
          }
        }
      }
    }
  }
}
