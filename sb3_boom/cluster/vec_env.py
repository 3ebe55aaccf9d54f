class RayVecEnv: pass
