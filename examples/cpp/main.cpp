// An exported model in C++: the policy prior and the planner, from one file (docs/deployment.md).
//
//     cmake -S examples/cpp -B build && cmake --build build
//     build/boom_agent model.onnx 100
//
// Acts on an observation of zeros for a robot that takes vectors, and prints actions and times. Trust the file: unlike the
// Python agent, this looks at nothing before onnxruntime does.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Inputs of one call. Whatever is added stays alive until the call is over.
class Inputs {
 public:
  explicit Inputs(const Ort::MemoryInfo& memory) : memory_(memory) {}

  template <typename T>
  void add(const char* name, std::vector<T>& data, const std::vector<int64_t>& shape) {
    names_.push_back(name);
    values_.push_back(Ort::Value::CreateTensor<T>(memory_, data.data(), data.size(), shape.data(), shape.size()));
  }

  std::vector<Ort::Value> run(Ort::Session& session, const std::vector<const char*>& outputs) const {
    return session.Run(Ort::RunOptions{nullptr}, names_.data(), values_.data(), values_.size(), outputs.data(),
                       outputs.size());
  }

 private:
  const Ort::MemoryInfo& memory_;
  std::vector<const char*> names_;
  std::vector<Ort::Value> values_;
};

std::vector<int64_t> shape_of(Ort::Session& session, const std::string& wanted) {
  Ort::AllocatorWithDefaultOptions allocator;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    if (wanted == session.GetInputNameAllocated(i, allocator).get()) {
      return session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
    }
  }
  throw std::runtime_error("the model has no input " + wanted);
}

size_t size_of(const std::vector<int64_t>& shape) {
  size_t size = 1;
  for (int64_t dim : shape) size *= static_cast<size_t>(dim);
  return size;
}

class Agent {
 public:
  Agent(const char* path, unsigned seed)
      : env_(ORT_LOGGING_LEVEL_ERROR, "boom"),
        session_(env_, path, options()),
        memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
        rng_(seed) {
    // 1 in place of the number of robots; the metadata tells how many iterations there are
    observation_shape_ = filled(shape_of(session_, "observation"), 1);
    mean_shape_ = filled(shape_of(session_, "mean"), 1);
    iterations_ = setting("\"n_iterations\": ");
    critics_ = setting("\"n_critics\": ");
    policy_shape_ = filled(shape_of(session_, "noise.policy"), 1);
    candidates_shape_ = of_iterations("noise.candidates");
    terminal_shape_ = of_iterations("noise.terminal");
    elite_shape_ = filled(shape_of(session_, "noise.elite"), 1);
    mean_.assign(size_of(mean_shape_), 0.0f);
  }

  size_t observation_size() const { return size_of(observation_shape_); }

  // An episode starts: forget the last plan.
  void reset() { std::fill(mean_.begin(), mean_.end(), 0.0f); }

  // The next action, from where the last call left off; with no iterations, the policy prior's.
  std::vector<float> act(std::vector<float> observation, bool plan) {
    const int64_t n = plan ? iterations_ : 0;
    candidates_shape_[0] = terminal_shape_[0] = n;
    std::vector<float> policy = normal(policy_shape_), candidates = normal(candidates_shape_);
    std::vector<float> terminal = normal(terminal_shape_), elite(size_of(elite_shape_));
    std::exponential_distribution<float> exponential;
    for (float& value : elite) value = -std::log(exponential(rng_));
    std::vector<int64_t> pairs = critic_pairs(n);

    Inputs inputs(memory_);
    inputs.add("observation", observation, observation_shape_);
    inputs.add("mean", mean_, mean_shape_);
    inputs.add("noise.policy", policy, policy_shape_);
    inputs.add("noise.candidates", candidates, candidates_shape_);
    inputs.add("noise.terminal", terminal, terminal_shape_);
    inputs.add("noise.elite", elite, elite_shape_);
    inputs.add("noise.critic_pairs", pairs, {n, 2});
    std::vector<Ort::Value> outputs = inputs.run(session_, {"action", "next_mean"});
    const float* action = outputs[0].GetTensorData<float>();
    const float* mean = outputs[1].GetTensorData<float>();
    if (plan) mean_.assign(mean, mean + mean_.size());
    return {action, action + outputs[0].GetTensorTypeAndShapeInfo().GetElementCount()};
  }

 private:
  static Ort::SessionOptions options() {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    return options;
  }

  // A free dimension is -1.
  static std::vector<int64_t> filled(std::vector<int64_t> shape, int64_t value) {
    std::replace(shape.begin(), shape.end(), int64_t{-1}, value);
    return shape;
  }

  std::vector<int64_t> of_iterations(const char* name) {
    std::vector<int64_t> shape = shape_of(session_, name);
    shape[0] = iterations_;
    return filled(shape, 1);
  }

  // Enough of a JSON reader for a number of a file that is trusted; a robot's own has a better one.
  int64_t setting(const char* key) {
    Ort::AllocatorWithDefaultOptions allocator;
    Ort::AllocatedStringPtr text = session_.GetModelMetadata().LookupCustomMetadataMapAllocated("sb3_boom", allocator);
    const char* found = text ? std::strstr(text.get(), key) : nullptr;
    if (found == nullptr) throw std::runtime_error(std::string("the metadata has no ") + key);
    return std::atoll(found + std::strlen(key));
  }

  std::vector<float> normal(const std::vector<int64_t>& shape) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(size_of(shape));
    for (float& value : values) value = distribution(rng_);
    return values;
  }

  // Two different critics for every iteration.
  std::vector<int64_t> critic_pairs(int64_t n) {
    std::uniform_int_distribution<int64_t> first(0, critics_ - 1), step(1, critics_ - 1);
    std::vector<int64_t> pairs;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t one = first(rng_);
      pairs.push_back(one);
      pairs.push_back((one + step(rng_)) % critics_);
    }
    return pairs;
  }

  Ort::Env env_;
  Ort::Session session_;
  Ort::MemoryInfo memory_;
  std::mt19937 rng_;
  int64_t iterations_ = 0, critics_ = 0;
  std::vector<int64_t> observation_shape_, mean_shape_, policy_shape_, candidates_shape_, terminal_shape_, elite_shape_;
  std::vector<float> mean_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: boom_agent MODEL.onnx [STEPS]\n");
    return 2;
  }
  try {
    Agent agent(argv[1], 0);
    const int steps = argc > 2 ? std::atoi(argv[2]) : 100;
    const std::vector<float> observation(agent.observation_size(), 0.0f);
    for (bool plan : {false, true}) {
      std::vector<double> milliseconds;
      std::vector<float> action;
      agent.reset();
      for (int i = 0; i < steps; ++i) {
        const auto start = std::chrono::steady_clock::now();
        action = agent.act(observation, plan);
        milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
      }
      std::nth_element(milliseconds.begin(), milliseconds.begin() + steps / 2, milliseconds.end());
      std::printf("%s: median %.3f ms, last action", plan ? "planner" : "prior", milliseconds[steps / 2]);
      for (float value : action) std::printf(" %.4f", value);
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "boom_agent: %s\n", error.what());
    return 1;
  }
}
